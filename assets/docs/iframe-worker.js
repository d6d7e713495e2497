// Search without a server. A page that was opened as a file may not start a web worker, so its script runs in a hidden frame
// that takes and gives the same messages. The name keeps the plugin `offline` from fetching a script that does this.
if (location.protocol === "file:")
  window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      this.frame = document.createElement("iframe");
      this.frame.hidden = true;
      document.body.append(this.frame);
      const inside = this.frame.contentWindow;
      // what the script inside calls to answer
      inside.postMessage = (data) => this.dispatchEvent(new MessageEvent("message", { data }));
      this.loaded = new Promise((done, failed) => {
        const script = inside.document.createElement("script");
        script.onload = () => done(inside);
        script.onerror = failed;
        script.src = new URL(url, location);
        inside.document.body.append(script);
      });
    }
    postMessage(data) {
      this.loaded.then((inside) => inside.dispatchEvent(new inside.MessageEvent("message", { data })));
    }
    terminate() {
      this.frame.remove();
    }
  };
