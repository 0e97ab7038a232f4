"""Image models of timm: the smallest variant of each family, as the library builds it, with fresh weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

from torch import nn

from benchmarks.models.entry import Entry, entry, images

ANY_SIZE = """
caformer_s18 convformer_s18 convmixer_768_32 convnext_atto convnextv2_atto crossvit_9_240 cs3darknet_focus_s
cspdarknet53 cspresnet50 darknet53 davit_tiny densenet121 dla46_c dpn48b eca_nfnet_l0 eca_resnet33ts edgenext_xx_small
efficientnet_b0 efficientvit_b0 efficientvit_m0 ese_vovnet19b_slim_dw fastvit_t8 fbnetc_100 focalnet_tiny_srf gernet_s
ghostnet_050 ghostnetv2_100 hardcorenas_a hgnetv2_b0 hrnet_w18_small inception_next_atto lambda_resnet26t lcnet_035
mambaout_femto mixnet_s mnasnet_small mobilenetv2_035 mobilenetv3_small_050 mobilenetv4_conv_small_035 mobilevit_xxs
mobilevitv2_050 mvitv2_tiny nextvit_small nf_regnet_b0 nf_resnet26 nfnet_l0 poolformer_s12 poolformerv2_s12 pvt_v2_b0
rdnet_tiny regnetx_002 regnety_002 repghostnet_050 repvgg_a0 repvit_m0_9 res2net50_14w_8s res2net50_48w_2s resnest14d
resnet10t resnet18 resnet26d resnetv2_50 resnext26ts resnext50_32x4d rexnet_100 selecsls42 sequencer2d_s seresnet18
shvit_s1 skresnet18 starnet_s050 swiftformer_xs tf_efficientnetv2_b0 tiny_vit_5m_224 tresnet_m twins_pcpvt_small
twins_svt_small vgg11_bn vovnet39a xception41 xcit_nano_12_p16_224
""".split()
"""Models that also run on images of 64 x 64."""

ONE_SIZE = """
bat_resnext26ts beit_base_patch16_224 botnet26t_256 cait_xxs24_224 coat_lite_tiny coatnet_pico_rw_224 convit_tiny
deit3_small_patch16_224 deit_tiny_distilled_patch16_224 deit_tiny_patch16_224 efficientformer_l1 efficientformerv2_s0
eva02_tiny_patch14_224 gcvit_xxtiny gmlp_ti16_224 halonet26t hiera_tiny_224 inception_v4 levit_128s maxvit_pico_rw_256
maxvit_rmlp_pico_rw_256 mixer_s16_224 mixer_s32_224 nest_tiny pit_ti_224 resmlp_12_224 swin_tiny_patch4_window7_224
swinv2_cr_tiny_224 swinv2_tiny_window8_256 tnt_s_patch16_224 visformer_tiny vit_relpos_small_patch16_224
vit_tiny_patch16_224 vit_tiny_r_s16_p8_224 volo_d1_224
""".split()
"""Models whose windows, positions or mixing over positions fit one size of image."""

SIZES = {
    "inception_v4": 299, "xception41": 299, "crossvit_9_240": 240, "resnet10t": 176, "nf_regnet_b0": 192,
    "tf_efficientnetv2_b0": 192,
    **dict.fromkeys(
        """bat_resnext26ts botnet26t_256 cs3darknet_focus_s cspdarknet53 cspresnet50 darknet53 eca_resnet33ts
        edgenext_xx_small fastvit_t8 halonet26t lambda_resnet26t maxvit_pico_rw_256 maxvit_rmlp_pico_rw_256
        mobilevit_xxs mobilevitv2_050 resnext26ts swinv2_tiny_window8_256""".split(),
        256,
    ),
}  # fmt: skip
"""Height and width of the images, where it is not 224."""

OPTIONS: dict[str, dict[str, Any]] = {"beit_base_patch16_224": {"depth": 3}}
"""Where the smallest variant has more than 50 million parameters in blocks that are all alike."""


def entries() -> Iterator[Entry]:
    """The models in alphabetical order, named as the command line names them; none without timm."""
    if find_spec("timm") is None:
        return
    for name in sorted([*ANY_SIZE, *ONE_SIZE]):
        size = SIZES.get(name, 224)
        small = images(64 if name in ANY_SIZE else size)
        yield entry(f"timm:{name}", "timm", _create(name), images(size), small)


def _create(name: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import timm

        model: nn.Module = timm.create_model(name, pretrained=False, **OPTIONS.get(name, {}))
        return model

    return build
