# SPDX-License-Identifier: Apache-2.0
"""Tiny detectors of transformers, by type."""

from typing import Any

from detector_case import CLASSES, SIDE
from tutelage.models.load import load

SMALL = {
    **{"d_model": 32, "encoder_attention_heads": 2, "encoder_ffn_dim": 16},
    **{"decoder_attention_heads": 2, "decoder_ffn_dim": 16, "decoder_layers": 2, "num_queries": 20},
}
RESNET = {
    **{"model_type": "rt_detr_resnet", "embedding_size": 8, "hidden_sizes": [8, 16, 16, 16], "depths": [1, 1, 1, 1]},
    **{"layer_type": "bottleneck", "out_features": ["stage2", "stage3", "stage4"]},
}
HGNET = {
    **{"model_type": "hgnet_v2", "stem_channels": [3, 8, 8], "stage_in_channels": [8, 8, 16, 16]},
    **{"stage_mid_channels": [4, 4, 8, 8], "stage_out_channels": [8, 16, 16, 16], "stage_num_blocks": [1, 1, 1, 1]},
    **{"stage_downsample": [False, True, True, True], "stage_light_block": [False, False, True, True]},
    **{"stage_kernel_size": [3, 3, 5, 5], "stage_numb_of_layers": [1, 1, 1, 1], "hidden_sizes": [8, 16, 16, 16]},
    **{"depths": [1, 1, 1, 1], "embedding_size": 8, "out_features": ["stage2", "stage3", "stage4"]},
}
HYBRID = {"encoder_hidden_dim": 32, "encoder_in_channels": [16] * 3, "decoder_in_channels": [32] * 3}
KINDS: dict[str, dict[str, Any]] = {
    "rt_detr": {**SMALL, **HYBRID, "hidden_expansion": 0.5, "backbone_config": RESNET},
    "d_fine": {**SMALL, **HYBRID, "hidden_expansion": 0.5, "backbone_config": HGNET},
    "deformable_detr": {**SMALL, "encoder_layers": 1, "backbone": "resnet10t", "use_timm_backbone": True},
    "detr": {**SMALL, "encoder_layers": 1, "backbone": "resnet10t", "use_timm_backbone": True},
    "table-transformer": {**SMALL, "encoder_layers": 1, "backbone": "resnet10t", "use_timm_backbone": True},
    "yolos": {
        **{"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16},
        **{"image_size": [SIDE, SIDE], "num_detection_tokens": 20},
    },
}


def made(kind: str, **more: Any) -> Any:
    return load({"model": f"hf:{kind}", **KINDS[kind], **more}, task="detection", num_classes=CLASSES, seed=0)
