"""The methods: what each does, its knobs, budgets.

| name | what it does | main knob | default |
|---|---|---|---|
| `tome` | [ToMe](https://arxiv.org/abs/2210.09461): merges the r most similar token pairs of every block | `r` | the r that leaves about 0.6 of what the blocks cost |
| `pitome` | [PiToMe](https://arxiv.org/abs/2405.16148): merges inside large clusters of similar tokens, protects isolated ones | `ratio` (or `r`) | `ratio=0.925` |
| `ats` | [ATS](https://arxiv.org/abs/2111.15667): each image keeps the tokens its own class token attends to, as many as it needs | `num_tokens` (or `keep`) | `keep=0.55` from a quarter of the depth on |
| `zero_tprune` | [Zero-TPrune](https://arxiv.org/abs/2305.17328): ranks tokens on the attention graph, drops near duplicates, then the least important | `layers, retain, r` | the 3.08 GFLOPs schedule of DeiT-S, scaled to the depth |
| `atp` | [ATP-LLaVA](https://arxiv.org/abs/2412.00447): in front of some decoder layers of a vision-language model, learned thresholds decide for each prompt which visual tokens stay; our interpretation, as paper and code are not public | `weights` | refuses without trained modules: `python -m vtok.eval.training.atp` |
| `todre` | [ToDRE](https://arxiv.org/abs/2505.18757), vision-language models: keeps visual tokens that are unlike each other, and drops them all at 7/8 of the LLM once the text has stopped looking | `keep` (or `keep_tokens`), `probe`, `tau` | `keep=0.1`, `probe=7/8`, `tau=0.1` |
| `divprune` | [DivPrune](https://openaccess.thecvf.com/content/CVPR2025/html/Alvar_DivPrune_Diversity-based_Visual_Token_Pruning_for_Large_Multimodal_Models_CVPR_2025_paper.html), vision-language models: of every image the visual tokens that lie farthest apart enter the LLM | `keep` (or `keep_tokens`) | `keep=0.098` |
| `fastv` | [FastV](https://arxiv.org/abs/2403.06764), vision-language models: in front of an early layer of the LLM, the visual tokens leave that the prompt's last token attends to least | `keep` (or `keep_tokens`), `layer` | `keep=0.5`, `layer=2` |
| `pyramiddrop` | [PyramidDrop](https://arxiv.org/abs/2410.17247), vision-language models: in front of three layers of the LLM, evenly spread, half of the visual tokens leave that are left | `keep`, `layers` | `keep=[0.5, 0.25, 0.125]`, in front of each quarter of the depth |
| `sparsevlm` | [SparseVLM](https://arxiv.org/abs/2410.04417), vision-language models: behind three layers of the LLM the visual tokens stay that chosen text tokens attend to, and averages of some that leave | `keep` (or `keep_tokens`), `layers`, `recycle` | 300, 200 and 110 of 576 behind layers 2, 6 and 15 |
| `dart` | [DART](https://arxiv.org/abs/2502.11494), vision-language models: in front of an early layer of the LLM the visual tokens stay that are least like a few pivots; no attention is looked at | `keep` (or `keep_tokens`), `layer`, `visual_pivots`, `text_pivots` | `keep=0.222`, `layer=2` |
| `cdpruner` | [CDPruner](https://arxiv.org/abs/2506.10967), vision-language models: of every image the visual tokens enter the LLM that are unlike each other and relevant to the text (a determinantal point process); relevance from the embeddings of the prompt is our interpretation, as these models lack the text tower of CLIP; `relevance="clip"` reads one | `keep` (or `keep_tokens`), `relevance` | `keep=1/9` |
| `correlation` | [Token-level correlation-guided compression](https://arxiv.org/abs/2407.14439): every crop of a page keeps as many visual tokens as its patches differ, those the class token attends to; the view of the whole page stays. LLaVA-NeXT, LLaVA-OneVision, InternVL, Idefics3, SmolVLM; our interpretation, as code and numbers are not public | `alpha` | none: pass it, or `calibration=[inputs, ...]`, a few pages on which 0.66 of the tokens of crops are to stay |
| `visionzip` | [VisionZip](https://arxiv.org/abs/2412.04467), vision-language models: of every view the tokens that the class token attends to most, and means of the others merged in front of the connector | `keep` (or `dominant`, `contextual`) | `keep=1/9` |
| `fastervlm` | [FasterVLM](https://arxiv.org/abs/2412.01818v1), vision-language models: of every view the tokens that the class token attends to most | `keep` (or `keep_tokens`) | `keep=1/9` |
| `vispruner` | [VisPruner](https://arxiv.org/abs/2412.01818), vision-language models: half of them by the class token's attention, half by dropping near duplicates of the rest in rounds | `keep` (or `keep_tokens`), `important` | `keep=1/9`, `important=0.5` |
| `prumerge` | [LLaVA-PruMerge](https://arxiv.org/abs/2403.15388) and PruMerge+ (`plus=True`), vision-language models: tokens of outstanding class attention take in their neighbours, one more takes in the rest | `keep`, `plus` | adaptive, as many as are outliers |
| `downsample` | the third baseline: every grid of visual tokens is pooled to a smaller one; vision-language models, videos too | `keep`, `mode` | `keep=1/9`, `mode="avg"` |
| `holov` | [HoloV](https://arxiv.org/abs/2510.02912), vision-language models: runs of tokens get shares of the budget by their class attention, and spend them on their most attended tokens | `keep`, `runs`, `variant` | `keep=1/9`, `runs=16` |
| `hired` | [HiRED](https://arxiv.org/abs/2408.10945), vision-language models: the whole view and the crops of an image share one budget by class attention | `keep`, `alpha` | `keep=0.2`, `alpha=0.5` |
| `evs` | [EVS](https://arxiv.org/abs/2510.14624), videos: the tokens that changed most since the frame before, the first frame whole | `keep` | `keep=0.25` |
| `vidcom2` | [VidCom2](https://arxiv.org/abs/2505.14454), videos: frames unlike the video get more of the budget, tokens unlike the means of video and frame stay | `keep` | `keep=0.25` |
| `fastvid` | [FastVID](https://arxiv.org/abs/2503.11187), videos: attended tokens of every frame, and density peaks of a segment that take in what is like them | `keep`, `segments`, `threshold` | `keep=0.1` |
| `pixel_dedup` | after [PixelPrune](https://arxiv.org/abs/2604.00886), the towers of the Qwen-VL family: of patches that show the same, pixel by pixel, the first enters the vision tower and the others do not; documents and screens | `threshold`, `compare` | `threshold=0`, with their neighbours |
| `random`, `uniform` | the baseline: a random, a regular subset in every block | `keep` | `keep=0.925` |

Every knob is documented on its config class (`help(vtok.PiToMe)`), with the paper's symbol, unit and range, and with what is our
interpretation where a paper is silent. `vtok.ToMe(r=13)` can be passed in place of a name and keywords.

The code of PiToMe's authors has settings of its own for each family of models. To compare with it, name the family:
`vtok.patch(model, "pitome", preset="official_clip")`, or `official_deit`, `official_mae`, `official_blip`, `official_llava`. Every
preset works on every backend.

# As their programs do

`preset="official"` asks for a method as its authors' program is: its counts, its order of tokens in the prompt and its positions,
which `positions=` overrides. What else a program does, and why the default does not, stands in the first lines of each method's
module; what it changes on a small model, in assets/docs/results/prompt_methods.md, beside a comparison of all methods.

# A budget instead of a knob

```python
vtok.patch(model, "tome", flops=0.6)  # the setting that leaves 60 % of the model's FLOPs
vtok.patch(model, "ats", flops=0.6, calibration=some_images)  # counts depend on the image: measured, not guessed
print(vtok.plan(model, "pitome", flops=0.5))  # the same question before anything runs
```

On a vision-language model both are stated for a prompt: tower, connector and prefill, every decoder layer with its tokens, and the
bytes of the KV cache. What depends on the words or the pixels is called an upper bound; after a run `vtok.info(vlm)` shows what it was.

```python
print(vtok.plan(vlm, "todre", keep=0.1, prompt={"images": 1, "text_tokens": 64}))  # LLaVA-1.5 7B in float16:
```
```
                               tokens  visual    GMACs  unpatched  reduction  KV MB  unpatched
tower, 1 view                     577          190.959    190.959      0.000
connector                                       12.080     12.080
choice among features                                                  1.950
decoder layers 0 to 27, each      122      58   24.812    132.876      0.000  1.999     10.486
decoder layer 28                  122      58   24.812    132.876      3.153  1.999     10.486
decoder layers 29 to 31, each     122      58   24.812    132.876      0.000  1.999     10.486
language head                       1            0.131      0.131
tower, connector and prefill: GMACs 4455.188 -> 997.144 + 5.103 for the reduction itself, ...; implied speed-up 4.47x
first token of the answer: GMACs 6.775 -> 6.640
KV cache of the prompt, float16: MB 335.544 -> 63.963
```
```python
vtok.patch(vlm, "todre", flops=0.3, prompt={"images": 1, "text_tokens": 64})  # the keep that leaves 30 % of it
```
"""  # noqa: E501  # rows of tables, which cannot be broken
