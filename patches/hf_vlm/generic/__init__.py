"""What the interfaces of a vision-language model say of it, for models that no row describes.

transformers 5.24 lists 100 image-text-to-text classes. Twelve are of a family that `vtok.patches.hf_vlm.families` describes by
a row; of the others, the prompts of 67 are shortened by the interfaces that all share: `get_image_features`,
`mm_encoder_outputs`, the id of a placeholder, an LLM that is given embeddings. `vtok matrix --generic` prints the table of
classes and methods, which stands in assets/docs/support.md. Tests build each from a tiny random config and compare it with the
unpatched model: on the whole prompt with what was dropped hidden in every layer where attention allows that, else fed by hand
with the columns that stay.

- Columns leave before the first layer, with all that rides along: kinds of tokens, embeddings for every layer (Gemma 3n,
  Gemma 4), features of deeper tower layers (Qwen3-VL, Granite Vision), positions in time, height and width. Layers that share
  keys and values, recurrent ones and convolutions read the shorter prompt.
- Tokens keep the positions that they had, and sliding windows look back over as many columns of the long prompt, unless an
  LLM counts columns itself: attention within chunks (Llama 4) and sparse attention to blocks (MiniMax M3) get a prompt that
  is numbered anew, as if it had been that short, whatever `positions` says. Inkling 2 measures distances in stored tokens.
- Between the layers of the LLM tokens leave where layers are attention over stored keys, sliding windows among it. Where
  queries and keys are made in another way than Llama's (Cohere 2, EXAONE 4, Apertus, DeepSeek V3 in Kimi K2.5, Gemma 4,
  HunYuan, LFM2, Muse, Persimmon in Fuyu, Qwen3.5) the layer before is run again as far as its kernel, to see what that is
  given. Gemma 4: no later than the first layer whose keys and values later layers read. Granite Vision and Qwen3-VL: behind
  the layers that features are added to. Recurrent layers and convolutions behind a drop (Qwen3.5, MiniCPM-V 4.6, LFM2-VL) read
  the tokens that are left, as if there had been no others; a method that chooses by attention acts behind a layer that has
  some. Not between layers that attend in chunks or choose among stored tokens, and not in Gemma 3n, whose layers hand on
  several hidden states of every token.
- The visual tokens of an image are one row: nothing is known of how they lie, so that methods that look into the vision tower
  or at crops need a row. What a model costs is not known: `vtok.plan` and `flops=` say so.
- Of the 36 classes that read videos the frames are known where the inputs say how many there are, as a column of tokens each:
  methods on frames act there. Five are refused to those, as they hand over chunks, frames or slices of a video one by one and
  nothing says which belong together (Kimi K2.5, MiniMax M3, MiniCPM-V 4.6 and 4.7 and its OCR); other methods keep a share of
  each of these. Frames that come one by one but in equal numbers are put together (Video-LLaVA, Perception LM). Where videos
  have the placeholder of images (GLM-4V, 4.6V, 5 and OCR, Molmo 2, Nemotron Omni), a prompt with both is refused. Of
  VideoLLaMA 3, what the processor left out of the prompt (`video_compression_mask`) is left out, and frames are then not
  known. Nemotron Omni drops tokens itself under `video_pruning_rate`, and is refused there.
- Methods that merge or drop inside vision encoders act in the towers that are those of the Qwen family
  (`vtok.patches.hf_packed`): in Qwen3-VL-MoE, Qwen3.5 and its mixture of experts, and Cosmos 3 Omni.

Twenty-one classes are refused (`vtok.patches.hf_vlm.generic.refused` says why): cross-attention, encoder-decoders, a Q-Former
inside, images that are put in front of a prompt or marked by no placeholder, and one language model that sees nothing.
"""
