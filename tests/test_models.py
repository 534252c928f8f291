"""Whole models against timm's: every architecture of the families, the same keys, numbers, features and options.

Every test of numbers runs on a few architectures in `make test` and on all of them in `make matrix`, where the tests
marked slow run too; the largest needs 16 GB of memory.
"""

import copy
import gc

import pytest
import timm
import torch
from helpers import assert_close_to_reference, compare, randomize_bn
from torch import nn

import regnet_fast
from regnet_fast.blocks.fused import FallbackWarning, Fused
from regnet_fast.observer import observing

FAMILIES = ("regnetx_*", "regnety_*", "regnetv_*", "regnetz_*", "repvgg_*", "resnetv2_*")
NAMES = [name for family in FAMILIES for name in timm.list_models(family)]
MAX_PARAMETERS = 30e6


def parameters(name: str) -> int:
    return sum(p.numel() for p in timm.create_model(name, device="meta").parameters())


SMALL = [
    "regnetx_002",
    "regnety_002",
    "regnetz_005",
    "regnetz_b16",
    "regnetv_040",
    "repvgg_a0",
    "resnetv2_18",
    "resnetv2_50",
]
FEW = ("regnety_002", "regnetz_b16", "repvgg_a0", "resnetv2_18")


def all_of_them(quick) -> list:
    """All architectures, those slow that `quick(name)` does not admit to `make test`."""
    return [name if quick(name) else pytest.param(name, marks=pytest.mark.slow) for name in NAMES]


def few(name: str):
    """For what each model takes several times."""
    return name if name in FEW else pytest.param(name, marks=pytest.mark.slow)


def moderate(name: str) -> bool:
    return parameters(name) <= MAX_PARAMETERS


def test_there_are_75_architectures():
    assert len(NAMES) == 75


@pytest.mark.parametrize("name", NAMES)
def test_same_keys_and_parameters(name):
    ours, theirs = regnet_fast.create_model(name, device="meta"), timm.create_model(name, device="meta")
    ours_state, theirs_state = ours.state_dict(), theirs.state_dict()
    assert list(ours_state) == list(theirs_state)
    assert [t.shape for t in ours_state.values()] == [t.shape for t in theirs_state.values()]
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())
    ours.load_state_dict(theirs_state, strict=True)
    theirs.load_state_dict(ours_state, strict=True)
    assert ours.pretrained_cfg == theirs.pretrained_cfg
    blocks = [m for m in ours.modules() if isinstance(m, Fused)]
    assert len(blocks) >= 6
    again = [path for path, _ in regnet_fast.rebuild(ours).rebuilt]
    assert not again


def numbers(name: str, dtype: torch.dtype, batch: int, height: int, width: int) -> None:
    """In 16 bits the errors of one image's logits are those of few values before them, and the largest is chance: where
    images miss the rule, half of four other draws have to miss it for a failure.
    """

    def missed() -> AssertionError | None:
        model = timm.create_model(name).eval()
        randomize_bn(model, 0)
        try:
            compare(model, torch.randn(batch, 3, height, width).to(dtype), name)
        except AssertionError as error:
            return error
        finally:
            del model
            gc.collect()

    error = missed()
    if error and (dtype == torch.float32 or sum(missed() is not None for _ in range(4)) >= 2):
        raise error


@pytest.mark.parametrize("name", all_of_them(moderate))
def test_logits_and_stages(name):
    numbers(name, torch.float32, 3, 65, 71)


@pytest.mark.parametrize("name", all_of_them(SMALL.__contains__))
def test_logits_and_stages_in_bfloat16(name):
    numbers(name, torch.bfloat16, 1, 64, 96)


@pytest.mark.parametrize(
    "name",
    [
        "regnetx_002",
        "resnetv2_18",
        *(pytest.param(name, marks=pytest.mark.slow) for name in SMALL if name not in ("regnetx_002", "resnetv2_18")),
    ],
)
def test_float16(name):
    numbers(name, torch.float16, 2, 64, 64)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", NAMES)
def test_logits_and_stages_the_other_way(name, dtype):
    """The batch of the one dtype with the other, and odd sizes with both."""
    numbers(name, dtype, *((1, 161, 127) if dtype == torch.float32 else (3, 65, 71)))


@pytest.fixture(autouse=True)
def two_threads():
    """With one thread torch leaves oneDNN for another library in some layers, whose float32 sums are more exact."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", SMALL)
def test_one_image_of_the_usual_size(name):
    model = timm.create_model(name).eval()
    randomize_bn(model, 0)
    compare(model, torch.randn(1, 3, 224, 224), name)


def options() -> list:
    return [
        dict(output_stride=8),
        dict(output_stride=16),
        dict(in_chans=1),
        dict(in_chans=5),
        dict(num_classes=7),
        dict(global_pool="avg"),
        dict(drop_path_rate=0.1, drop_rate=0.2),
    ]


@pytest.mark.parametrize("kwargs", options(), ids=lambda kwargs: "-".join(map(str, kwargs.items())))
@pytest.mark.parametrize("name", [few(name) for name in SMALL])
def test_options(name, kwargs):
    model = timm.create_model(name, **kwargs).eval()
    randomize_bn(model, 0)
    compare(model, torch.randn(2, kwargs.get("in_chans", 3), 64, 64), f"{name} {kwargs}")


@pytest.mark.slow
@pytest.mark.parametrize(
    "kwargs",
    [
        dict(in_chans=1, output_stride=8, num_classes=0),
        dict(in_chans=5, output_stride=16),
        dict(features_only=True),
    ],
    ids=lambda kwargs: "-".join(kwargs),
)
@pytest.mark.parametrize("name", NAMES)
def test_options_of_every_architecture(name, kwargs):
    model = timm.create_model(name, **kwargs).eval()
    randomize_bn(model, 0, torch.randn(4, kwargs.get("in_chans", 3), 128, 128))
    compare(model, torch.randn(2, kwargs.get("in_chans", 3), 64, 64), f"{name} {kwargs}")
    del model
    gc.collect()


@pytest.mark.parametrize("pool", ["", "max", "avgmax", "catavgmax", "fast", "fastmax"])
def test_other_pooling_is_timms(pool):
    kwargs = dict(global_pool=pool, num_classes=0) if pool == "" else dict(global_pool=pool)
    theirs = timm.create_model("regnety_002", **kwargs).eval()
    randomize_bn(theirs, 0)
    ours = regnet_fast.rebuild(copy.deepcopy(theirs))
    assert [path for path, _, _ in ours.kept] == ([] if pool == "fast" else ["head"])
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(ours.model(x), theirs(x), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", SMALL)
def test_embeddings_and_features(name):
    theirs = timm.create_model(name, num_classes=0).eval()
    randomize_bn(theirs, 0)
    state = theirs.state_dict()
    ours = regnet_fast.create_model(name, num_classes=0).eval()
    ours.load_state_dict(state)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(
            ours.forward_head(ours.forward_features(x), pre_logits=True), theirs(x), rtol=1e-3, atol=1e-4
        )
    for kwargs in (
        dict(),
        dict(out_indices=(1, 3)),
        dict(feature_cls="dict"),
        dict(feature_cls="hook"),
        dict(feature_cls="getter"),
    ):
        a = regnet_fast.create_model(name, features_only=True, **kwargs).eval()
        b = timm.create_model(name, features_only=True, **kwargs).eval()
        assert list(a.state_dict()) == list(b.state_dict())
        assert any(isinstance(m, Fused) for m in a.modules())
        randomize_bn(b, 0)
        a.load_state_dict(b.state_dict())
        assert a.feature_info.channels() == b.feature_info.channels()
        with torch.no_grad():
            found, expected = a(x), b(x)
        pairs = (
            zip(found.values(), expected.values(), strict=True)
            if isinstance(found, dict)
            else zip(found, expected, strict=True)
        )
        for f, e in pairs:
            torch.testing.assert_close(f, e, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["regnety_002", "repvgg_a0", "resnetv2_18"])
def test_fx_features_are_timms(name):
    """timm traces the model before we see it: nothing is left to rebuild, and nothing is lost."""
    model = regnet_fast.create_model(name, features_only=True, feature_cls="fx").eval()
    with torch.no_grad():
        assert len(model(torch.randn(1, 3, 64, 64))) == 5


def test_fx_tracing_keeps_blocks_whole():
    from timm.models import create_feature_extractor

    model = regnet_fast.create_model("regnety_002").eval()
    randomize_bn(model, 0)
    x = torch.randn(1, 3, 64, 64)
    extractor = create_feature_extractor(model, ["s2", "s4"])
    with torch.no_grad():
        assert any(isinstance(m, Fused) for m in extractor.modules())
    with torch.no_grad(), regnet_fast.backend("aten"):  # a stage's program rounds otherwise than its blocks
        found = extractor(x)
        assert torch.equal(found["s4"], model.forward_intermediates(x, intermediates_only=True)[-1])


def test_repvgg_reparameterised_after_rebuilding():
    theirs = timm.create_model("repvgg_a0").eval()
    randomize_bn(theirs, 0)
    ours = regnet_fast.rebuild(copy.deepcopy(theirs)).model
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = theirs(x)
        deployed = timm.utils.reparameterize_model(ours)
        assert len(deployed.state_dict()) == 46
        with observing(block=lambda block, image, plan, reason: heard.append(reason)):
            heard = []
            torch.testing.assert_close(deployed(x), expected, rtol=1e-3, atol=1e-4)
        assert set(heard) == {None}


def test_odd_widths_of_regnety_2560():
    """Its widths and group width are no multiples of 8; one block of that kind stands for its 1283 M parameters."""
    block = timm.models.regnet.Bottleneck(746, 746, group_size=373, stride=2).eval()
    randomize_bn(block, 0)
    ours = regnet_fast.rebuild(copy.deepcopy(block)).model
    x = torch.randn(1, 746, 5, 7)
    with torch.no_grad():
        assert_close_to_reference(
            ours(x),
            block(x.contiguous(memory_format=torch.channels_last)),
            copy.deepcopy(block).double()(x.double()),
            "odd widths",
            groups=2,
        )


@pytest.mark.parametrize("name", ["regnety_002", "repvgg_a0", "resnetv2_18"])
def test_model_surgery_of_timm(name):
    """freeze_batch_norm_2d, convert_sync_batchnorm, EMA and reset_classifier work on a rebuilt model."""
    theirs = timm.create_model(name).eval()
    randomize_bn(theirs, 0)
    x = torch.randn(2, 3, 64, 64)
    heard = []
    with torch.no_grad(), observing(block=lambda block, image, plan, reason: heard.append(reason)):
        expected = theirs(x)
        for surgery in (
            timm.layers.freeze_batch_norm_2d,
            timm.layers.convert_sync_batchnorm,
            torch.nn.SyncBatchNorm.convert_sync_batchnorm,
        ):
            ours = surgery(regnet_fast.rebuild(copy.deepcopy(theirs)).model).eval()
            if surgery == torch.nn.SyncBatchNorm.convert_sync_batchnorm:
                expected_here = surgery(copy.deepcopy(theirs)).eval()(x)  # torch drops the activations
            else:
                expected_here = expected
            assert (ours(x) - expected_here).norm() <= 1e-3 * expected_here.norm()
        ema = timm.utils.ModelEmaV3(regnet_fast.rebuild(copy.deepcopy(theirs)).model, decay=0.5)
        torch.testing.assert_close(ema.module(x), expected, rtol=1e-3, atol=1e-4)
        other = copy.deepcopy(theirs)
        randomize_bn(other, 1)
        before = ema.module(x)
        ema.update(other)
        assert not torch.allclose(ema.module(x), before, rtol=1e-3, atol=1e-4)
        assert torch.allclose(ema.module(x), regnet_fast.restore(copy.deepcopy(ema.module))(x), rtol=1e-3, atol=1e-4)
    assert None in heard


def test_whole_network_that_contains_blocks():
    class Segmenter(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = timm.create_model("regnety_002", features_only=True)
            self.decoder = nn.Sequential(nn.Conv2d(368, 8, 1), nn.BatchNorm2d(8), nn.ReLU())

        def forward(self, x):
            return self.decoder(self.encoder(x)[-1])

    theirs = Segmenter().eval()
    randomize_bn(theirs, 0, torch.randn(2, 3, 64, 64))
    report = regnet_fast.rebuild(theirs, inplace=False)
    assert report.model is not theirs and not any(isinstance(m, Fused) for m in theirs.modules())
    assert len(report.rebuilt) == 14 and type(report.model.decoder[0]) is nn.Conv2d
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(report.model(x), theirs(x), rtol=1e-3, atol=1e-4)


def test_features_with_a_warning_free_forward(recwarn):
    model = regnet_fast.create_model("resnetv2_50d_gn").eval()
    with torch.no_grad():
        model(torch.randn(1, 3, 64, 64))
    assert not [w for w in recwarn if issubclass(w.category, FallbackWarning)]
