"""What the interfaces of a vision-language model say of it, for models that no row describes.

transformers 5.24 lists 100 image-text-to-text classes. Twelve are of a family that `vtok.patches.hf_vlm.families` describes by a
row; of the others, the prompts of those below are shortened by the interfaces that all share: `get_image_features`,
`mm_encoder_outputs`, the id of a placeholder, an LLM that is given embeddings. Tests build each from a tiny random config and
compare it with the unpatched model: on the whole prompt with what was dropped hidden in every layer where attention allows that,
else fed by hand with the columns that stay.

- Columns leave before the first layer, with all that rides along: kinds of tokens, embeddings for every layer (Gemma 3n, Gemma 4),
  features of deeper tower layers (Qwen3-VL, Granite Vision), positions in time, height and width. Layers that share keys and
  values, recurrent ones and convolutions read the shorter prompt.
- Tokens keep the positions that they had, and sliding windows look back over as many columns of the long prompt, unless an LLM
  counts columns itself: attention within chunks (Llama 4) and sparse attention to blocks (MiniMax M3) get a prompt that is numbered
  anew, as if it had been that short, whatever `positions` says. Inkling 2 measures distances in stored tokens.
- The visual tokens of an image are one row: nothing is known of how they lie, so that methods that look into the vision tower or at
  crops need a row. What a model costs is not known: `vtok.plan` and `flops=` say so.
- Of the 36 classes that read videos the frames are known where the inputs say how many there are, as a column of tokens each:
  methods on frames act there. Five are refused to those, as they hand over chunks, frames or slices of a video one by one and
  nothing says which belong together (Kimi K2.5, MiniMax M3, MiniCPM-V 4.6 and 4.7 and its OCR); other methods keep a share of each
  of these. Frames that come one by one but in equal numbers are put together (Video-LLaVA, Perception LM). Where videos have the
  placeholder of images (GLM-4V, 4.6V, 5 and OCR, Molmo 2, Nemotron Omni), a prompt with both is refused. Of VideoLLaMA 3, what the
  processor left out of the prompt (`video_compression_mask`) is left out, and frames are then not known. Nemotron Omni drops tokens
  itself under `video_pruning_rate`, and is refused there.

Twenty-one classes are refused (`vtok.patches.hf_vlm.generic.refused` says why): cross-attention, encoder-decoders, a Q-Former
inside, images that are put in front of a prompt or marked by no placeholder, and one language model that sees nothing.

<!-- generic matrix: `vtok matrix --generic` -->

| class | cdpruner | dart | divprune | downsample | evs | fastv | fastvid | pixel_dedup | pyramiddrop | random | sparsevlm | todre | uniform | vidcom2 |
|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|
| apertus1p5 | generic | no <sup>1</sup> | generic | generic | no <sup>2</sup> | no <sup>1</sup> | no <sup>2</sup> | no <sup>3</sup> | no <sup>1</sup> | generic | no <sup>1</sup> | no <sup>1</sup> | generic | no <sup>2</sup> |
| aria | generic | generic | generic | generic | no <sup>2</sup> | generic | no <sup>2</sup> | no <sup>3</sup> | generic | generic | generic | generic | generic | no <sup>2</sup> |
| aya_vision | generic | no <sup>1</sup> | generic | generic | no <sup>2</sup> | no <sup>1</sup> | no <sup>2</sup> | no <sup>3</sup> | no <sup>1</sup> | generic | no <sup>1</sup> | no <sup>1</sup> | generic | no <sup>2</sup> |
| cohere2_vision | generic | no <sup>1</sup> | generic | generic | no <sup>2</sup> | no <sup>1</sup> | no <sup>2</sup> | no <sup>3</sup> | no <sup>1</sup> | generic | no <sup>1</sup> | no <sup>1</sup> | generic | no <sup>2</sup> |
| cohere_compass | generic | generic | generic | generic | generic | generic | generic | no <sup>3</sup> | generic | generic | generic | generic | generic | generic |
| cosmos3_edge | generic | generic | generic | generic | generic | generic | generic | no <sup>3</sup> | generic | generic | generic | generic | generic | generic |
| cosmos3_omni | generic | generic | generic | generic | generic | generic | generic | generic | generic | generic | generic | generic | generic | generic |
| deepseek_ocr2 | generic | generic | generic | generic | no <sup>2</sup> | generic | no <sup>2</sup> | no <sup>3</sup> | generic | generic | generic | generic | generic | no <sup>2</sup> |
| deepseek_vl | generic | generic | generic | generic | no <sup>2</sup> | generic | no <sup>2</sup> | no <sup>3</sup> | generic | generic | generic | generic | generic | no <sup>2</sup> |
| deepseek_vl_hybrid | generic | generic | generic | generic | no <sup>2</sup> | generic | no <sup>2</sup> | no <sup>3</sup> | generic | generic | generic | generic | generic | no <sup>2</sup> |
| dots3_note | generic | no <sup>4</sup> | generic | generic | generic | no <sup>4</sup> | generic | no <sup>3</sup> | no <sup>4</sup> | generic | no <sup>4</sup> | no <sup>4</sup> | generic | generic |
| emu3 | generic | generic | generic | generic | no <sup>2</sup> | generic | no <sup>2</sup> | no <sup>3</sup> | generic | generic | generic | generic | generic | no <sup>2</sup> |
| ernie4_5_vl_moe | generic | no <sup>1</sup> | generic | generic | generic | no <sup>1</sup> | generic | no <sup>3</sup> | no <sup>1</sup> | generic | no <sup>1</sup> | no <sup>1</sup> | generic | generic |
| exaone4_5 | generic | no <sup>1</sup> | generic | generic | generic | no <sup>1</sup> | generic | no <sup>3</sup> | no <sup>1</sup> | generic | no <sup>1</sup> | no <sup>1</sup> | generic | generic |
| fast_vlm | generic | generic | generic | generic | no <sup>2</sup> | generic | no <sup>2</sup> | no <sup>3</sup> | generic | generic | generic | generic | generic | no <sup>2</sup> |
| fuyu | generic | no <sup>1</sup> | generic | generic | no <sup>2</sup> | no <sup>1</sup> | no <sup>2</sup> | no <sup>3</sup> | no <sup>1</sup> | generic | no <sup>1</sup> | no <sup>1</sup> | generic | no <sup>2</sup> |
| gemma3n | generic | no <sup>5</sup> | generic | generic | no <sup>2</sup> | no <sup>5</sup> | no <sup>2</sup> | no <sup>3</sup> | no <sup>5</sup> | generic | no <sup>5</sup> | no <sup>5</sup> | generic | no <sup>2</sup> |
| gemma4 | generic | no <sup>5</sup> | generic | generic | generic | no <sup>5</sup> | generic | no <sup>3</sup> | no <sup>5</sup> | generic | no <sup>5</sup> | no <sup>5</sup> | generic | generic |
| gemma4_unified | generic | no <sup>1</sup> | generic | generic | generic | no <sup>1</sup> | generic | no <sup>3</sup> | no <sup>1</sup> | generic | no <sup>1</sup> | no <sup>1</sup> | generic | generic |
| glm46v | generic | generic | generic | generic | generic | generic | generic | no <sup>3</sup> | generic | generic | generic | generic | generic | generic |
| glm4v | generic | generic | generic | generic | generic | generic | generic | no <sup>3</sup> | generic | generic | generic | generic | generic | generic |
| glm4v_moe | generic | generic | generic | generic | generic | generic | generic | no <sup>3</sup> | generic | generic | generic | generic | generic | generic |
| glm5_next | generic | no <sup>6</sup> | generic | generic | generic | no <sup>6</sup> | generic | no <sup>3</sup> | no <sup>6</sup> | generic | no <sup>6</sup> | no <sup>6</sup> | generic | generic |
| glm_ocr | generic | generic | generic | generic | generic | generic | generic | no <sup>3</sup> | generic | generic | generic | generic | generic | generic |
| glmga | generic | generic | generic | generic | generic | generic | generic | no <sup>3</sup> | generic | generic | generic | generic | generic | generic |
| got_ocr2 | generic | generic | generic | generic | no <sup>2</sup> | generic | no <sup>2</sup> | no <sup>3</sup> | generic | generic | generic | generic | generic | no <sup>2</sup> |
| granite4_vision | generic | no <sup>1</sup> | generic | generic | no <sup>2</sup> | no <sup>1</sup> | no <sup>2</sup> | no <sup>3</sup> | no <sup>1</sup> | generic | no <sup>1</sup> | no <sup>1</sup> | generic | no <sup>2</sup> |
| granite_docling | generic | generic | generic | generic | no <sup>2</sup> | generic | no <sup>2</sup> | no <sup>3</sup> | generic | generic | generic | generic | generic | no <sup>2</sup> |
| hunyuan_vl | generic | no <sup>1</sup> | generic | generic | no <sup>2</sup> | no <sup>1</sup> | no <sup>2</sup> | no <sup>3</sup> | no <sup>1</sup> | generic | no <sup>1</sup> | no <sup>1</sup> | generic | no <sup>2</sup> |
| hy_v4_vl | generic | no <sup>4</sup> | generic | generic | generic | no <sup>4</sup> | generic | no <sup>3</sup> | no <sup>4</sup> | generic | no <sup>4</sup> | no <sup>4</sup> | generic | generic |
| hyperclovax_vision_v2 | generic | generic | generic | generic | generic | generic | generic | generic | generic | generic | generic | generic | generic | generic |
| idefics2 | generic | generic | generic | generic | no <sup>2</sup> | generic | no <sup>2</sup> | no <sup>3</sup> | generic | generic | generic | generic | generic | no <sup>2</sup> |
| inkling2 | generic | no <sup>7</sup> | generic | generic | no <sup>2</sup> | no <sup>7</sup> | no <sup>2</sup> | no <sup>3</sup> | no <sup>7</sup> | generic | no <sup>7</sup> | no <sup>7</sup> | generic | no <sup>2</sup> |
| inkling2_loop | generic | no <sup>7</sup> | generic | generic | no <sup>2</sup> | no <sup>7</sup> | no <sup>2</sup> | no <sup>3</sup> | no <sup>7</sup> | generic | no <sup>7</sup> | no <sup>7</sup> | generic | no <sup>2</sup> |
| janus | generic | generic | generic | generic | no <sup>2</sup> | generic | no <sup>2</sup> | no <sup>3</sup> | generic | generic | generic | generic | generic | no <sup>2</sup> |
| kimi_k25 | generic | no <sup>1</sup> | generic | generic | no <sup>8</sup> | no <sup>1</sup> | no <sup>8</sup> | no <sup>3</sup> | no <sup>1</sup> | generic | no <sup>1</sup> | no <sup>1</sup> | generic | no <sup>8</sup> |
| lfm2_vl | generic | no <sup>9</sup> | generic | generic | no <sup>2</sup> | no <sup>9</sup> | no <sup>2</sup> | no <sup>3</sup> | no <sup>9</sup> | generic | no <sup>9</sup> | no <sup>9</sup> | generic | no <sup>2</sup> |
| lfm3_vl | generic | no <sup>9</sup> | generic | generic | generic | no <sup>9</sup> | generic | no <sup>3</sup> | no <sup>9</sup> | generic | no <sup>9</sup> | no <sup>9</sup> | generic | generic |
| lighton_ocr | generic | generic | generic | generic | no <sup>2</sup> | generic | no <sup>2</sup> | no <sup>3</sup> | generic | generic | generic | generic | generic | no <sup>2</sup> |
| llama4 | generic | no <sup>10</sup> | generic | generic | no <sup>2</sup> | no <sup>10</sup> | no <sup>2</sup> | no <sup>3</sup> | no <sup>10</sup> | generic | no <sup>10</sup> | no <sup>10</sup> | generic | no <sup>2</sup> |
| llava_next_video | generic | generic | generic | generic | generic | generic | generic | no <sup>3</sup> | generic | generic | generic | generic | generic | generic |
| minicpm_ocr | generic | no <sup>11</sup> | generic | generic | no <sup>12</sup> | no <sup>11</sup> | no <sup>12</sup> | no <sup>3</sup> | no <sup>11</sup> | generic | no <sup>11</sup> | no <sup>11</sup> | generic | no <sup>12</sup> |
| minicpmv4_6 | generic | no <sup>11</sup> | generic | generic | no <sup>12</sup> | no <sup>11</sup> | no <sup>12</sup> | no <sup>3</sup> | no <sup>11</sup> | generic | no <sup>11</sup> | no <sup>11</sup> | generic | no <sup>12</sup> |
| minicpmv4_7 | generic | no <sup>11</sup> | generic | generic | no <sup>12</sup> | no <sup>11</sup> | no <sup>12</sup> | no <sup>3</sup> | no <sup>11</sup> | generic | no <sup>11</sup> | no <sup>11</sup> | generic | no <sup>12</sup> |
| minimax_m3_vl | generic | no <sup>13</sup> | generic | generic | no <sup>8</sup> | no <sup>13</sup> | no <sup>8</sup> | no <sup>3</sup> | no <sup>13</sup> | generic | no <sup>13</sup> | no <sup>13</sup> | generic | no <sup>8</sup> |
| mistral3 | generic | generic | generic | generic | no <sup>2</sup> | generic | no <sup>2</sup> | no <sup>3</sup> | generic | generic | generic | generic | generic | no <sup>2</sup> |
| mistral_large4 | generic | no <sup>4</sup> | generic | generic | no <sup>2</sup> | no <sup>4</sup> | no <sup>2</sup> | no <sup>3</sup> | no <sup>4</sup> | generic | no <sup>4</sup> | no <sup>4</sup> | generic | no <sup>2</sup> |
| molmo2 | generic | generic | generic | generic | generic | generic | generic | no <sup>3</sup> | generic | generic | generic | generic | generic | generic |
| muse_glimmer | generic | no <sup>1</sup> | generic | generic | generic | no <sup>1</sup> | generic | no <sup>3</sup> | no <sup>1</sup> | generic | no <sup>1</sup> | no <sup>1</sup> | generic | generic |
| muse_spark | generic | no <sup>1</sup> | generic | generic | generic | no <sup>1</sup> | generic | no <sup>3</sup> | no <sup>1</sup> | generic | no <sup>1</sup> | no <sup>1</sup> | generic | generic |
| nemotron_h_omni | generic | no <sup>11</sup> | generic | generic | generic | no <sup>11</sup> | generic | no <sup>3</sup> | no <sup>11</sup> | generic | no <sup>11</sup> | no <sup>11</sup> | generic | generic |
| ovis2 | generic | generic | generic | generic | no <sup>2</sup> | generic | no <sup>2</sup> | no <sup>3</sup> | generic | generic | generic | generic | generic | no <sup>2</sup> |
| paddleocr_vl | generic | generic | generic | generic | no <sup>2</sup> | generic | no <sup>2</sup> | no <sup>3</sup> | generic | generic | generic | generic | generic | no <sup>2</sup> |
| perception_lm | generic | generic | generic | generic | generic | generic | generic | no <sup>3</sup> | generic | generic | generic | generic | generic | generic |
| pp_chart2table | generic | generic | generic | generic | no <sup>2</sup> | generic | no <sup>2</sup> | no <sup>3</sup> | generic | generic | generic | generic | generic | no <sup>2</sup> |
| qianfan_ocr | generic | generic | generic | generic | no <sup>2</sup> | generic | no <sup>2</sup> | no <sup>3</sup> | generic | generic | generic | generic | generic | no <sup>2</sup> |
| qwen2_5_omni_thinker | generic | generic | generic | generic | generic | generic | generic | no <sup>3</sup> | generic | generic | generic | generic | generic | generic |
| qwen3_5 | generic | no <sup>11</sup> | generic | generic | generic | no <sup>11</sup> | generic | generic | no <sup>11</sup> | generic | no <sup>11</sup> | no <sup>11</sup> | generic | generic |
| qwen3_5_moe | generic | no <sup>11</sup> | generic | generic | generic | no <sup>11</sup> | generic | generic | no <sup>11</sup> | generic | no <sup>11</sup> | no <sup>11</sup> | generic | generic |
| qwen3_omni_moe_thinker | generic | generic | generic | generic | generic | generic | generic | no <sup>3</sup> | generic | generic | generic | generic | generic | generic |
| qwen3_vl_moe | generic | generic | generic | generic | generic | generic | generic | generic | generic | generic | generic | generic | generic | generic |
| qwen4_exp | generic | no <sup>6</sup> | generic | generic | generic | no <sup>6</sup> | generic | no <sup>3</sup> | no <sup>6</sup> | generic | no <sup>6</sup> | no <sup>6</sup> | generic | generic |
| step3p7 | generic | generic | generic | generic | no <sup>2</sup> | generic | no <sup>2</sup> | no <sup>3</sup> | generic | generic | generic | generic | generic | no <sup>2</sup> |
| unlimited_ocr | generic | no <sup>14</sup> | generic | generic | no <sup>2</sup> | no <sup>14</sup> | no <sup>2</sup> | no <sup>3</sup> | no <sup>14</sup> | generic | no <sup>14</sup> | no <sup>14</sup> | generic | no <sup>2</sup> |
| video_llama_3 | generic | generic | generic | generic | generic | generic | generic | no <sup>3</sup> | generic | generic | generic | generic | generic | generic |
| video_llava | generic | generic | generic | generic | generic | generic | generic | no <sup>3</sup> | generic | generic | generic | generic | generic | generic |
| vipllava | generic | generic | generic | generic | no <sup>2</sup> | generic | no <sup>2</sup> | no <sup>3</sup> | generic | generic | generic | generic | generic | no <sup>2</sup> |

1. drops tokens between decoder layers, but none can leave between the layers of the model: its LLM is not among those whose layers vtok has been tested with.
2. drops visual tokens of videos, and the model reads none.
3. drops patches in front of the vision tower, which the one of the model cannot do without: it is none of the Qwen-VL family, whose towers take any patches; choose a method that drops visual tokens behind it, such as downsample.
4. drops tokens between decoder layers, but none can leave between the layers of the model: its LLM has layers of type indexed_attention, whose state cannot forget single tokens or counts them.
5. drops tokens between decoder layers, but none can leave between the layers of the model: layers of its LLM share keys and values, and would have to hold the same tokens.
6. drops tokens between decoder layers, but none can leave between the layers of the model: its LLM has layers of type indexed_attention, linear_attention, whose state cannot forget single tokens or counts them.
7. drops tokens between decoder layers, but none can leave between the layers of the model: its LLM has layers of type hybrid, hybrid_sliding, whose state cannot forget single tokens or counts them.
8. compares the frames of a video, which cannot be told of the model: a long video comes in chunks, which are handed over one by one, and nothing says which belong together.
9. drops tokens between decoder layers, but none can leave between the layers of the model: its LLM has layers of type conv, whose state cannot forget single tokens or counts them.
10. drops tokens between decoder layers, but none can leave between the layers of the model: its LLM has layers of type chunked_attention, whose state cannot forget single tokens or counts them.
11. drops tokens between decoder layers, but none can leave between the layers of the model: its LLM has layers of type linear_attention, whose state cannot forget single tokens or counts them.
12. compares the frames of a video, which cannot be told of the model: its frames, and slices of frames, are handed over one by one, and nothing says which belong together.
13. drops tokens between decoder layers, but none can leave between the layers of the model: its LLM has layers of type minimax_m3_sparse, whose state cannot forget single tokens or counts them.
14. drops tokens between decoder layers, but none can leave between the layers of the model: its LLM has layers of type reference_sliding_attention, whose state cannot forget single tokens or counts them.

On none of them: atp, ats, correlation, fastervlm, hired, holov, pitome, prumerge, tome, visionzip, vispruner, zero_tprune, which need the row of a family.

**67 classes x 26 methods: 608 cells generic.**

<!-- end of the generic matrix -->
"""  # noqa: E501  # rows of the table, which cannot be broken
