"""Results of the paper and its blog post that ours are held against.

Kudugunta et al. 2021, Beyond Distillation: Task-level Mixture-of-Experts for Efficient Inference
(arXiv 2110.03742). Averages over the 30 trained directions are ours, from its Table 1.
"""

#: Average BLEU of the 30 trained directions (Table 1): dense with one expert's width, token/token,
#: target/target.
BLEU = {"narrow": 20.60, "token": 22.63, "task": 22.91}
#: Peak decoding throughput, task-routed over token-routed, 32 TPU v3 cores (section 4).
THROUGHPUT_RATIO = 1.87
#: Share of decoding time in inter-device communication (section 4).
COMMUNICATION_SHARE = {"token": 0.269, "task": 0.0}
#: Decoder parameters, whole over one task's (section 4: 220M against 31.5M).
DECODER_RATIO = 7.0
#: Devices needed to serve: token-routed, and one task's sub-network (blog).
DEVICES = {"token": 64, "task": 1}
#: System of the study -> (BLEU, BLEU of the narrow dense model over the same directions): averages
#: of the 30 trained directions (Table 1); distilled of 8 pairs (Table 2); static of 32 (Table 5),
#: where we know no dense average.
STUDY: dict[str, tuple[float, float | None]] = {
    "narrow": (20.60, 20.60),
    "token": (22.63, 20.60),
    "sentence": (20.44, 20.60),
    "target": (22.91, 20.60),
    "token-target": (23.52, 20.60),
    "static": (17.6, None),
    "distilled": (26.9, 25.9),
}
#: Percent of the gain over dense that the distilled student keeps: of its token-routed teacher's,
#: and of the task-routed model's (blog, Table 2).
DISTILLATION_KEEPS = {"teacher": 43, "task": 32}
