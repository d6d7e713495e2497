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
- The visual tokens of an image are one row: nothing is known of how they lie, so that methods that look into the vision tower, at
  crops or frames need a row. What a model costs is not known: `vtok.plan` and `flops=` say so.
- Methods that merge or drop inside vision encoders act in the towers that are those of the Qwen family (`vtok.patches.hf_packed`):
  in Qwen3-VL-MoE, Qwen3.5 and its mixture of experts, and Cosmos 3 Omni.

Twenty-one classes are refused (`vtok.patches.hf_vlm.generic.refused` says why): cross-attention, encoder-decoders, a Q-Former
inside, images that are put in front of a prompt or marked by no placeholder, and one language model that sees nothing.

<!-- generic matrix: `vtok matrix --generic` -->

| class | cdpruner | dart | divprune | downsample | fastv | pitome | pyramiddrop | random | sparsevlm | todre | uniform |
|---|---|---|---|---|---|---|---|---|---|---|---|
| apertus1p5 | generic | no <sup>1</sup> | generic | generic | no <sup>1</sup> | no <sup>2</sup> | no <sup>1</sup> | generic | no <sup>1</sup> | no <sup>1</sup> | generic |
| aria | generic | generic | generic | generic | generic | no <sup>2</sup> | generic | generic | generic | generic | generic |
| aya_vision | generic | no <sup>1</sup> | generic | generic | no <sup>1</sup> | no <sup>2</sup> | no <sup>1</sup> | generic | no <sup>1</sup> | no <sup>1</sup> | generic |
| cohere2_vision | generic | no <sup>1</sup> | generic | generic | no <sup>1</sup> | no <sup>2</sup> | no <sup>1</sup> | generic | no <sup>1</sup> | no <sup>1</sup> | generic |
| cohere_compass | generic | generic | generic | generic | generic | no <sup>2</sup> | generic | generic | generic | generic | generic |
| cosmos3_edge | generic | generic | generic | generic | generic | no <sup>2</sup> | generic | generic | generic | generic | generic |
| cosmos3_omni | generic | generic | generic | generic | generic | generic | generic | generic | generic | generic | generic |
| deepseek_ocr2 | generic | generic | generic | generic | generic | no <sup>2</sup> | generic | generic | generic | generic | generic |
| deepseek_vl | generic | generic | generic | generic | generic | no <sup>2</sup> | generic | generic | generic | generic | generic |
| deepseek_vl_hybrid | generic | generic | generic | generic | generic | no <sup>2</sup> | generic | generic | generic | generic | generic |
| dots3_note | generic | no <sup>3</sup> | generic | generic | no <sup>3</sup> | no <sup>2</sup> | no <sup>3</sup> | generic | no <sup>3</sup> | no <sup>3</sup> | generic |
| emu3 | generic | generic | generic | generic | generic | no <sup>2</sup> | generic | generic | generic | generic | generic |
| ernie4_5_vl_moe | generic | no <sup>1</sup> | generic | generic | no <sup>1</sup> | no <sup>2</sup> | no <sup>1</sup> | generic | no <sup>1</sup> | no <sup>1</sup> | generic |
| exaone4_5 | generic | no <sup>1</sup> | generic | generic | no <sup>1</sup> | no <sup>2</sup> | no <sup>1</sup> | generic | no <sup>1</sup> | no <sup>1</sup> | generic |
| fast_vlm | generic | generic | generic | generic | generic | no <sup>2</sup> | generic | generic | generic | generic | generic |
| fuyu | generic | no <sup>1</sup> | generic | generic | no <sup>1</sup> | no <sup>2</sup> | no <sup>1</sup> | generic | no <sup>1</sup> | no <sup>1</sup> | generic |
| gemma3n | generic | no <sup>4</sup> | generic | generic | no <sup>4</sup> | no <sup>2</sup> | no <sup>4</sup> | generic | no <sup>4</sup> | no <sup>4</sup> | generic |
| gemma4 | generic | no <sup>4</sup> | generic | generic | no <sup>4</sup> | no <sup>2</sup> | no <sup>4</sup> | generic | no <sup>4</sup> | no <sup>4</sup> | generic |
| gemma4_unified | generic | no <sup>1</sup> | generic | generic | no <sup>1</sup> | no <sup>2</sup> | no <sup>1</sup> | generic | no <sup>1</sup> | no <sup>1</sup> | generic |
| glm46v | generic | generic | generic | generic | generic | no <sup>2</sup> | generic | generic | generic | generic | generic |
| glm4v | generic | generic | generic | generic | generic | no <sup>2</sup> | generic | generic | generic | generic | generic |
| glm4v_moe | generic | generic | generic | generic | generic | no <sup>2</sup> | generic | generic | generic | generic | generic |
| glm5_next | generic | no <sup>5</sup> | generic | generic | no <sup>5</sup> | no <sup>2</sup> | no <sup>5</sup> | generic | no <sup>5</sup> | no <sup>5</sup> | generic |
| glm_ocr | generic | generic | generic | generic | generic | no <sup>2</sup> | generic | generic | generic | generic | generic |
| glmga | generic | generic | generic | generic | generic | no <sup>2</sup> | generic | generic | generic | generic | generic |
| got_ocr2 | generic | generic | generic | generic | generic | no <sup>2</sup> | generic | generic | generic | generic | generic |
| granite4_vision | generic | no <sup>1</sup> | generic | generic | no <sup>1</sup> | no <sup>2</sup> | no <sup>1</sup> | generic | no <sup>1</sup> | no <sup>1</sup> | generic |
| granite_docling | generic | generic | generic | generic | generic | no <sup>2</sup> | generic | generic | generic | generic | generic |
| hunyuan_vl | generic | no <sup>1</sup> | generic | generic | no <sup>1</sup> | no <sup>2</sup> | no <sup>1</sup> | generic | no <sup>1</sup> | no <sup>1</sup> | generic |
| hy_v4_vl | generic | no <sup>3</sup> | generic | generic | no <sup>3</sup> | no <sup>2</sup> | no <sup>3</sup> | generic | no <sup>3</sup> | no <sup>3</sup> | generic |
| hyperclovax_vision_v2 | generic | generic | generic | generic | generic | no <sup>6</sup> | generic | generic | generic | generic | generic |
| idefics2 | generic | generic | generic | generic | generic | no <sup>2</sup> | generic | generic | generic | generic | generic |
| inkling2 | generic | no <sup>7</sup> | generic | generic | no <sup>7</sup> | no <sup>2</sup> | no <sup>7</sup> | generic | no <sup>7</sup> | no <sup>7</sup> | generic |
| inkling2_loop | generic | no <sup>7</sup> | generic | generic | no <sup>7</sup> | no <sup>2</sup> | no <sup>7</sup> | generic | no <sup>7</sup> | no <sup>7</sup> | generic |
| janus | generic | generic | generic | generic | generic | no <sup>2</sup> | generic | generic | generic | generic | generic |
| kimi_k25 | generic | no <sup>1</sup> | generic | generic | no <sup>1</sup> | no <sup>2</sup> | no <sup>1</sup> | generic | no <sup>1</sup> | no <sup>1</sup> | generic |
| lfm2_vl | generic | no <sup>8</sup> | generic | generic | no <sup>8</sup> | no <sup>2</sup> | no <sup>8</sup> | generic | no <sup>8</sup> | no <sup>8</sup> | generic |
| lfm3_vl | generic | no <sup>8</sup> | generic | generic | no <sup>8</sup> | no <sup>2</sup> | no <sup>8</sup> | generic | no <sup>8</sup> | no <sup>8</sup> | generic |
| lighton_ocr | generic | generic | generic | generic | generic | no <sup>2</sup> | generic | generic | generic | generic | generic |
| llama4 | generic | no <sup>9</sup> | generic | generic | no <sup>9</sup> | no <sup>2</sup> | no <sup>9</sup> | generic | no <sup>9</sup> | no <sup>9</sup> | generic |
| llava_next_video | generic | generic | generic | generic | generic | no <sup>2</sup> | generic | generic | generic | generic | generic |
| minicpm_ocr | generic | no <sup>10</sup> | generic | generic | no <sup>10</sup> | no <sup>2</sup> | no <sup>10</sup> | generic | no <sup>10</sup> | no <sup>10</sup> | generic |
| minicpmv4_6 | generic | no <sup>10</sup> | generic | generic | no <sup>10</sup> | no <sup>2</sup> | no <sup>10</sup> | generic | no <sup>10</sup> | no <sup>10</sup> | generic |
| minicpmv4_7 | generic | no <sup>10</sup> | generic | generic | no <sup>10</sup> | no <sup>2</sup> | no <sup>10</sup> | generic | no <sup>10</sup> | no <sup>10</sup> | generic |
| minimax_m3_vl | generic | no <sup>11</sup> | generic | generic | no <sup>11</sup> | no <sup>2</sup> | no <sup>11</sup> | generic | no <sup>11</sup> | no <sup>11</sup> | generic |
| mistral3 | generic | generic | generic | generic | generic | no <sup>2</sup> | generic | generic | generic | generic | generic |
| mistral_large4 | generic | no <sup>3</sup> | generic | generic | no <sup>3</sup> | no <sup>2</sup> | no <sup>3</sup> | generic | no <sup>3</sup> | no <sup>3</sup> | generic |
| molmo2 | generic | generic | generic | generic | generic | no <sup>2</sup> | generic | generic | generic | generic | generic |
| muse_glimmer | generic | no <sup>1</sup> | generic | generic | no <sup>1</sup> | no <sup>2</sup> | no <sup>1</sup> | generic | no <sup>1</sup> | no <sup>1</sup> | generic |
| muse_spark | generic | no <sup>1</sup> | generic | generic | no <sup>1</sup> | no <sup>2</sup> | no <sup>1</sup> | generic | no <sup>1</sup> | no <sup>1</sup> | generic |
| nemotron_h_omni | generic | no <sup>10</sup> | generic | generic | no <sup>10</sup> | no <sup>2</sup> | no <sup>10</sup> | generic | no <sup>10</sup> | no <sup>10</sup> | generic |
| ovis2 | generic | generic | generic | generic | generic | no <sup>2</sup> | generic | generic | generic | generic | generic |
| paddleocr_vl | generic | generic | generic | generic | generic | no <sup>2</sup> | generic | generic | generic | generic | generic |
| perception_lm | generic | generic | generic | generic | generic | no <sup>2</sup> | generic | generic | generic | generic | generic |
| pp_chart2table | generic | generic | generic | generic | generic | no <sup>2</sup> | generic | generic | generic | generic | generic |
| qianfan_ocr | generic | generic | generic | generic | generic | no <sup>2</sup> | generic | generic | generic | generic | generic |
| qwen2_5_omni_thinker | generic | generic | generic | generic | generic | no <sup>2</sup> | generic | generic | generic | generic | generic |
| qwen3_5 | generic | no <sup>10</sup> | generic | generic | no <sup>10</sup> | generic | no <sup>10</sup> | generic | no <sup>10</sup> | no <sup>10</sup> | generic |
| qwen3_5_moe | generic | no <sup>10</sup> | generic | generic | no <sup>10</sup> | generic | no <sup>10</sup> | generic | no <sup>10</sup> | no <sup>10</sup> | generic |
| qwen3_omni_moe_thinker | generic | generic | generic | generic | generic | no <sup>2</sup> | generic | generic | generic | generic | generic |
| qwen3_vl_moe | generic | generic | generic | generic | generic | generic | generic | generic | generic | generic | generic |
| qwen4_exp | generic | no <sup>5</sup> | generic | generic | no <sup>5</sup> | no <sup>2</sup> | no <sup>5</sup> | generic | no <sup>5</sup> | no <sup>5</sup> | generic |
| step3p7 | generic | generic | generic | generic | generic | no <sup>2</sup> | generic | generic | generic | generic | generic |
| unlimited_ocr | generic | no <sup>12</sup> | generic | generic | no <sup>12</sup> | no <sup>2</sup> | no <sup>12</sup> | generic | no <sup>12</sup> | no <sup>12</sup> | generic |
| video_llama_3 | generic | generic | generic | generic | generic | no <sup>2</sup> | generic | generic | generic | generic | generic |
| video_llava | generic | generic | generic | generic | generic | no <sup>2</sup> | generic | generic | generic | generic | generic |
| vipllava | generic | generic | generic | generic | generic | no <sup>2</sup> | generic | generic | generic | generic | generic |

1. drops tokens between decoder layers, but none can leave between the layers of the model: its LLM is not among those whose layers vtok has been tested with.
2. reduces tokens inside the vision tower, and that of the model cannot be patched: no row says which views of its vision tower an image of the model is made of; methods that act on its prompts: atp, cdpruner, correlation, dart, divprune, downsample, evs, fastervlm, fastv, fastvid, hired, holov, prumerge, pyramiddrop, random, sparsevlm, todre, uniform, vidcom2, visionzip, vispruner.
3. drops tokens between decoder layers, but none can leave between the layers of the model: its LLM has layers of type indexed_attention, whose state cannot forget single tokens or counts them.
4. drops tokens between decoder layers, but none can leave between the layers of the model: layers of its LLM share keys and values, and would have to hold the same tokens.
5. drops tokens between decoder layers, but none can leave between the layers of the model: its LLM has layers of type indexed_attention, linear_attention, whose state cannot forget single tokens or counts them.
6. reduces tokens inside the vision tower, and that of the model cannot be patched: Qwen2_5_VisionTransformerPretrainedModel runs the patches of all images as one sequence, cut where images end, and the model is not known to take its visual tokens as they leave it; methods that act on its prompts: atp, cdpruner, correlation, dart, divprune, downsample, evs, fastervlm, fastv, fastvid, hired, holov, prumerge, pyramiddrop, random, sparsevlm, todre, uniform, vidcom2, visionzip, vispruner.
7. drops tokens between decoder layers, but none can leave between the layers of the model: its LLM has layers of type hybrid, hybrid_sliding, whose state cannot forget single tokens or counts them.
8. drops tokens between decoder layers, but none can leave between the layers of the model: its LLM has layers of type conv, whose state cannot forget single tokens or counts them.
9. drops tokens between decoder layers, but none can leave between the layers of the model: its LLM has layers of type chunked_attention, whose state cannot forget single tokens or counts them.
10. drops tokens between decoder layers, but none can leave between the layers of the model: its LLM has layers of type linear_attention, whose state cannot forget single tokens or counts them.
11. drops tokens between decoder layers, but none can leave between the layers of the model: its LLM has layers of type minimax_m3_sparse, whose state cannot forget single tokens or counts them.
12. drops tokens between decoder layers, but none can leave between the layers of the model: its LLM has layers of type reference_sliding_attention, whose state cannot forget single tokens or counts them.

On none of them: atp, ats, correlation, evs, fastervlm, fastvid, hired, holov, prumerge, tome, vidcom2, visionzip, vispruner, zero_tprune, which need the row of a family, or a deeper tower than these have.

**67 classes x 25 methods: 514 cells generic.**

<!-- end of the generic matrix -->
"""  # noqa: E501  # rows of the table, which cannot be broken
