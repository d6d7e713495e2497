"""Which settings are asked of which tiny model: name -> settings, `None` = the engine without vtok."""

FEATURES = {
    "plain": None,
    "uniform": {"method": "uniform", "keep": 0.3},
    "random": {"method": "random", "keep": 0.25, "seed": 7},
    "downsample": {"method": "downsample", "keep": 0.25},
    "todre": {"method": "todre", "keep_tokens": 12, "probe": None},
    "todre_center": {"method": "todre", "keep": 0.1, "pivot": "center", "probe": None},
    "divprune": {"method": "divprune", "keep_tokens": 10},
    "cdpruner": {"method": "cdpruner", "keep": 0.2, "relevance": "none"},
}
TOWER = {
    "fastervlm": {"method": "fastervlm", "keep_tokens": 12},
    "vispruner": {"method": "vispruner", "keep": 0.25},
    "visionzip": {"method": "visionzip", "keep": 0.25},
    "holov": {"method": "holov", "keep": 0.25, "runs": 4},
    "prumerge": {"method": "prumerge", "keep": 0.25, "layer": -2},
    "prumerge_plus": {"method": "prumerge", "keep_tokens": 16, "plus": True, "layer": -2},
}
CASES = {
    "llava": {**FEATURES, **TOWER},
    "llava_siglip": {
        **{name: FEATURES[name] for name in ("plain", "todre", "divprune")},
        "fastervlm": TOWER["fastervlm"],
        "visionzip": TOWER["visionzip"],
        "prumerge": {"method": "prumerge", "keep": 0.25},
    },
}
# Towers of Qwen-VL cannot be looked into: without a pivot, todre's is "center".
_GRIDS = {name: one for name, one in FEATURES.items() if name != "todre"}
# Newline tokens of the tiny models lie at the mean, where another pivot would be one of their copies.
_CROPS = {name: one for name, one in FEATURES.items() if name != "todre_center"}
# Tokens of the tiny models are 128 wide: near so many that stay, only rounding tells what another one would add.
_CROPS["cdpruner"] = {"method": "cdpruner", "keep": 0.1, "relevance": "none"}
_CROPS["todre_farthest"] = {"method": "todre", "keep": 0.1, "pivot": "farthest", "probe": None}
CASES |= {
    "llava_next": {**_CROPS, **TOWER},
    "onevision": {
        **_CROPS,
        **{name: TOWER[name] for name in ("fastervlm", "visionzip", "vispruner", "holov")},
        "prumerge": {"method": "prumerge", "keep": 0.25},
    },
    "internvl": {**FEATURES, **{name: TOWER[name] for name in ("fastervlm", "visionzip", "vispruner", "holov")}},
    "idefics3": {**FEATURES, **{name: TOWER[name] for name in ("fastervlm", "visionzip", "vispruner", "holov")}},
    "gemma3": {**FEATURES, **{name: TOWER[name] for name in ("fastervlm", "visionzip", "vispruner", "holov")}},
    "qwen2": _GRIDS,
    "qwen25": _GRIDS,
    "qwen3": _GRIDS,
    # In transformers vtok does not know the grids of this model's images, so that there these two choose from a row of tokens.
    "qwen35": {name: one for name, one in _GRIDS.items() if name not in ("uniform", "downsample")},
}
CASES["smolvlm"] = {name: CASES["idefics3"][name] for name in ("plain", "uniform", "todre", "divprune", "fastervlm", "holov")}
VIDEO = {"evs": {"method": "evs", "keep": 0.4}, "vidcom2": {"method": "vidcom2", "keep": 0.3}}
_CLIPS = {name: FEATURES[name] for name in ("plain", "uniform", "divprune", "todre_center")}
CASES |= {"onevision_video": {**_CLIPS, **VIDEO}, "qwen2_video": {**_CLIPS, **VIDEO}, "qwen25_video": {**_CLIPS, **VIDEO}}
# vLLM's own class fails on videos of several lengths at once, so that there is no "plain".
CASES["onevision_video"] = {
    **{name: FEATURES[name] for name in ("uniform", "divprune")},
    "todre_farthest": _CROPS["todre_farthest"],
    **{name: TOWER[name] for name in ("fastervlm", "visionzip")},
    **VIDEO,
}
# Model -> positions of `prune_inputs`, "compact" elsewhere.
POSITIONS = {"qwen2": "original", "qwen25": "original", "qwen3": "original", "qwen35": "original"}
POSITIONS |= {"qwen2_video": "original", "qwen25_video": "original"}
# Models that let the tokens of an image attend to each other both ways, which vLLM does on GPUs alone: compared without it.
CAUSAL = ("gemma3",)
# vLLM caches no prefixes of a model that it takes for one with linear attention, and that has none.
UNCACHED = ("qwen35",)
# Model -> what its processor is told, there and here.
PROCESSED = {
    "gemma3": {
        "do_pan_and_scan": True,
        "pan_and_scan_min_crop_size": 16,
        "pan_and_scan_max_num_crops": 3,
        "pan_and_scan_min_ratio_to_activate": 1.2,
    }
}
# Models whose images transformers prunes together, all of a prompt; an engine prunes each by itself, and so does the reference.
APART = ("idefics3", "smolvlm")
