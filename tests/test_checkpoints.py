"""Checkpoints with the names and shapes of the published files, and every way in which a file can be wrong."""

import contextlib
import os
import pkgutil
import re
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.serialization import set_crc32_options

from ferdlib.models import build_model, load_checkpoint, load_robustbench, small_cnn

TINY = {"architecture": "wide_resnet_10_1", "num_classes": 3}


def batchnorm(name, channels):
    statistics = ("weight", "bias", "running_mean", "running_var")
    return {f"{name}.{s}": (channels,) for s in statistics} | {f"{name}.num_batches_tracked": ()}


def wide_resnet_shapes(depth, width, num_classes=10, *, sub_block1=False):
    """TRADES' and RobustBench's WideResNet. TRADES registers its first stage twice, and runs it once."""
    stages = [("block1", 16, 16 * width)]
    stages += [("sub_block1", 16, 16 * width)] * sub_block1
    stages += [("block2", 16 * width, 32 * width), ("block3", 32 * width, 64 * width)]
    shapes = {"conv1.weight": (16, 3, 3, 3)}
    for stage, before, channels in stages:
        for k in range((depth - 4) // 6):
            block, inner = f"{stage}.layer.{k}", before if k == 0 else channels
            shapes |= batchnorm(f"{block}.bn1", inner)
            shapes[f"{block}.conv1.weight"] = (channels, inner, 3, 3)
            shapes |= batchnorm(f"{block}.bn2", channels)
            shapes[f"{block}.conv2.weight"] = (channels, channels, 3, 3)
            if inner != channels:
                shapes[f"{block}.convShortcut.weight"] = (channels, inner, 1, 1)
    shapes |= batchnorm("bn1", 64 * width)
    return shapes | {"fc.weight": (num_classes, 64 * width), "fc.bias": (num_classes,)}


def resnet_shapes(stem, blocks, num_classes=10, *, shortcut, linear):
    """A post-activation ResNet whose stages double the channels; the sources differ in two names."""
    shapes = {"conv1.weight": (stem, 3, 3, 3)} | batchnorm("bn1", stem)
    before = stem
    for stage, count in enumerate(blocks):
        channels = stem * 2**stage
        for k in range(count):
            block, inner = f"layer{stage + 1}.{k}", before if k == 0 else channels
            for i, incoming in enumerate((inner, channels), start=1):
                shapes[f"{block}.conv{i}.weight"] = (channels, incoming, 3, 3)
                shapes |= batchnorm(f"{block}.bn{i}", channels)
            if inner != channels:
                shapes[f"{block}.{shortcut}.0.weight"] = (channels, inner, 1, 1)
                shapes |= batchnorm(f"{block}.{shortcut}.1", channels)
        before = channels
    return shapes | {f"{linear}.weight": (num_classes, before), f"{linear}.bias": (num_classes,)}


def numbered(shapes, dtype=torch.float32):
    """Weights that are all alike inside a tensor and differ between them; a file holds one number of each."""
    return OrderedDict(
        (key, torch.tensor(i, dtype=dtype if shape else torch.int64).expand(shape))
        for i, (key, shape) in enumerate(shapes.items())
    )


def assert_landed(model, weights, rename=str):
    """Each tensor of the file is, under its name in the model, the model's own."""
    own = model.state_dict()
    assert own.keys() == {rename(key) for key in weights}
    for key, value in weights.items():
        assert own[rename(key)].shape == value.shape
        assert bool((own[rename(key)] == value).all()), key
    assert not any(m.training for m in model.modules())
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert {p.device.type for p in model.parameters()} == {"cpu"}


def save(folder, content, name="file.pt", **options):
    path = Path(folder, name)
    torch.save(content, path, **options)
    return path


def random_weights(name=TINY["architecture"], num_classes=TINY["num_classes"], seed=0):
    """The weights of a network that tells images apart, with BatchNorm statistics of its own."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build_model(name, num_classes)
        model(torch.rand(8, 3, 8, 8))
    return model.state_dict()


def without(weights, part):
    return {key: value for key, value in weights.items() if part not in key}


def prefixed(weights, prefix):
    return {prefix + key: value for key, value in weights.items()}


def another(weights):
    """Another network of the same names and shapes."""
    return {key: value + 1 for key, value in weights.items()}


def test_published_sizes():
    for shapes, published in (
        (wide_resnet_shapes(34, 10), 46_160_474),
        (resnet_shapes(64, (2, 2, 2, 2), shortcut="shortcut", linear="linear"), 11_173_962),
        (resnet_shapes(16, (9, 9, 9), shortcut="downsample", linear="fc"), 855_770),
    ):
        learned = [s for key, s in shapes.items() if not re.search("running|num_batches", key)]
        assert sum(torch.Size(shape).numel() for shape in learned) == published


@pytest.mark.parametrize(
    ("file", "name", "num_classes", "sub_block1"),
    [
        ("Chen2024Data_WRN_34_10.pt", None, 10, False),
        ("Zhang2019Theoretically.pt", None, 10, True),
        ("model_cifar_wrn.pt", None, 10, True),
        ("renamed.bin", "Chen2024Data_WRN_34_10", 100, False),
    ],
)
def test_robustbench_and_trades(tmp_path, file, name, num_classes, sub_block1):
    weights = numbered(wide_resnet_shapes(34, 10, num_classes, sub_block1=sub_block1))
    path = save(tmp_path, weights, file)
    assert path.stat().st_size < 200_000
    arguments = {} if num_classes == 10 else {"num_classes": num_classes}
    assert_landed(load_robustbench(path, name=name, **arguments), without(weights, "sub_block1"))


def test_robustbench_takes_what_data_parallel_wrote(tmp_path):
    weights = numbered(wide_resnet_shapes(34, 10, sub_block1=True), torch.float16)
    content = {"state_dict": prefixed(weights, "module."), "epoch": 110, "best": 0.5}
    path = str(save(tmp_path, content, "Zhang2019Theoretically.pt"))
    assert_landed(load_robustbench(path), without(weights, "sub_block1"))


@pytest.mark.parametrize("sub_block1", [False, True])
@pytest.mark.parametrize(
    "wrap",
    [
        dict,
        lambda w: prefixed(w, "module."),
        lambda w: prefixed(w, "_orig_mod.module."),
        lambda w: prefixed(w, "module.model."),
        lambda w: {"state_dict": w},
        lambda w: {"epoch": 3, "model_state_dict": w},
        lambda w: {"model": w, "optimizer": {"state": {}, "param_groups": []}},
        lambda w: {"net": prefixed(w, "module."), "acc": 87.0, "epoch": 3},  # as kuangliu's script
        lambda w: {"student": {"state_dict": prefixed(w, "module.")}},
        lambda w: {"model": "wide_resnet_10_1", "net": w},
        lambda w: {"state_dict": None, "model": {"epoch": 3}, "student": w},
        lambda w: prefixed(w, "module.module._orig_mod."),
        # As parts that are compiled or wrapped by FSDP.
        lambda w: {k.replace("block1.", "block1._orig_mod."): v for k, v in w.items()},
        lambda w: {k.replace(".0.", ".0._fsdp_wrapped_module."): v for k, v in w.items()},
        lambda w: prefixed(w, "1."),  # Sequential(normalise, net)
        lambda w: {"state_dict": prefixed(w, "student.")},  # as Lightning
        lambda w: {"state_dict": prefixed(w, "net."), "optimizer_states": [{"state": {}}]},
        lambda w: {"state_dict_ema": w, "epoch": 3},
        lambda w: {"n_averaged": torch.tensor(3), **prefixed(w, "module.")},  # as AveragedModel
        lambda w: {**w, "epoch": 3, "arch": "wrn"},
        lambda w: {"params": prefixed(w, "backbone.wrn.")},
        # Another network lies beside the one that is meant.
        lambda w: {"state_dict_ema": another(w), "state_dict": w},  # as timm
        lambda w: {"model_ema": prefixed(another(w), "module."), "model": w},  # as torchvision
        lambda w: {"state_dict": prefixed(another(w), "teacher.") | prefixed(w, "student.")},
        lambda w: {"state_dict": {"teacher.conv.weight": torch.ones(9)} | prefixed(w, "model.")},
        lambda w: {"teacher": another(w), "network": w},
        lambda w: {"best": w, "last": {k: v.clone() for k, v in w.items()}},
    ],
)
def test_wrappers_and_prefixes(tmp_path, wrap, sub_block1):
    weights = numbered(wide_resnet_shapes(10, 1, 3, sub_block1=sub_block1))
    model = load_checkpoint(save(tmp_path, wrap(weights)), **TINY)
    assert_landed(model, without(weights, "sub_block1"))


def test_residual_network_without_weights_in_its_shortcuts(tmp_path):
    weights = resnet_shapes(16, (9, 9, 9), shortcut="shortcut", linear="linear")  # as Fair-ARD's
    path = save(tmp_path, {"net": prefixed(numbered(without(weights, "shortcut")), "module.")})
    for architecture in ("resnet56", "resnet56_padding_shortcut"):
        model = load_checkpoint(path, architecture=architecture, num_classes=10)
        assert_landed(model, numbered(without(weights, "shortcut")), torchvision_names)
    path = save(tmp_path, numbered(weights))
    assert "unexpected: layer2.0.shortcut.0.weight" in refused(
        path, architecture="resnet56_padding_shortcut", num_classes=10
    )


@pytest.mark.parametrize("new", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes_and_file_formats(tmp_path, dtype, new):
    weights = numbered(wide_resnet_shapes(10, 1, 3), dtype)
    path = save(tmp_path, weights, _use_new_zipfile_serialization=new)
    assert_landed(load_checkpoint(path, **TINY), weights)


def test_files_of_torch_before_0_4_1_have_no_count_of_batches(tmp_path):
    weights = without(numbered(wide_resnet_shapes(10, 1, 3)), "num_batches_tracked")
    model = load_checkpoint(save(tmp_path, weights), **TINY)
    for key, value in model.state_dict().items():
        assert bool((value == weights.get(key, 0)).all())


def torchvision_names(key):
    return key.replace("linear.", "fc.").replace("shortcut.", "downsample.")


@pytest.mark.parametrize(("shortcut", "linear"), [("shortcut", "linear"), ("downsample", "fc")])
@pytest.mark.parametrize(
    ("architecture", "stem", "blocks", "num_classes"),
    [("resnet18", 64, (2, 2, 2, 2), 10), ("resnet56", 16, (9, 9, 9), 100)],
)
def test_residual_networks_under_both_names(
    tmp_path, architecture, stem, blocks, num_classes, shortcut, linear
):
    # kuangliu's and FERD's ResNet-18 say shortcut and linear, chenyaofo's cifar10_resnet56 downsample and fc.
    weights = numbered(resnet_shapes(stem, blocks, num_classes, shortcut=shortcut, linear=linear))
    path = save(tmp_path, {"net": prefixed(weights, "module.")})
    model = load_checkpoint(path, architecture=architecture, num_classes=num_classes)
    assert_landed(model, weights, torchvision_names)


def test_the_other_name_of_a_linear_layer_works_in_both_directions(tmp_path):
    weights = random_weights("mobilenet_v2", 10)  # kuangliu's says linear, FERD's fc
    other = {key.replace("linear.", "fc."): value for key, value in weights.items()}
    assert other.keys() != weights.keys()
    model = load_checkpoint(save(tmp_path, other), architecture="mobilenet_v2", num_classes=10)
    assert_landed(model, weights)


def test_the_loaded_model_computes_the_same_logits(tmp_path):
    weights = random_weights()
    path = save(tmp_path, {"state_dict": prefixed(weights, "module.")})
    model = build_model(**TINY).eval()
    x = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    before = torch.get_rng_state()
    loaded = load_checkpoint(path, **TINY)
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(loaded(x), model(x))
    model.load_state_dict(weights)
    assert torch.equal(loaded(x), model(x))
    assert loaded(x).std(dim=0).min() > 0


def test_a_file_that_names_its_architecture(tmp_path):
    weights = random_weights("small_cnn_2", 4)
    path = save(tmp_path, {"architecture": "small_cnn_2", "num_classes": 4, "state_dict": weights})
    assert_landed(load_checkpoint(path), weights)
    assert_landed(load_checkpoint(path, num_classes=4), weights)
    with pytest.raises(ValueError, match="^load_checkpoint: expected `path` .* of a small_cnn_3"):
        load_checkpoint(path, architecture="small_cnn_3")  # what the caller says counts
    with pytest.raises(ValueError, match="fc.weight [(]4, 4[)] instead of [(]5, 4[)]"):
        load_checkpoint(path, num_classes=5)


def test_grey_images(tmp_path):
    weights = small_cnn(1, 3, width=2).state_dict()
    path = save(tmp_path, weights)
    arguments = {"architecture": "small_cnn_2", "num_classes": 3}
    assert_landed(load_checkpoint(path, in_channels=1, **arguments), weights)
    with pytest.raises(ValueError, match="layer1.0.weight .*1, 3, 3[)] instead of .*3, 3, 3[)]"):
        load_checkpoint(path, **arguments)


def refused(path, *, load=load_checkpoint, argument="path", kind=ValueError, **arguments):
    """The one sentence that the file is refused with."""
    if load is load_checkpoint:
        arguments = TINY | arguments
    with pytest.raises(kind) as caught:
        load(path, **arguments)
    message = str(caught.value)
    assert type(caught.value) is kind
    # An architecture and its sizes are refused by the function that builds it.
    function = load.__name__ if argument in ("path", "name") else r"\w+"
    assert re.match(rf"{function}: expected `{argument}`", message)
    assert ", got " in message
    assert "\n" not in message
    return message


def test_another_architecture_lists_what_is_missing_and_unexpected(tmp_path):
    path = save(
        tmp_path, numbered(resnet_shapes(16, (9, 9, 9), shortcut="downsample", linear="fc"))
    )
    message = refused(path, load=load_robustbench, name="Chen2024Data_WRN_34_10")
    assert "wide_resnet_34_10" in message
    assert re.search(r"; missing: block1\.layer\.0\.bn1\.weight, .* and \d+ more", message)
    assert re.search(r"; unexpected: layer1\.0\.conv1\.weight, .* and \d+ more", message)
    assert "; of another shape: bn1.weight (16,) instead of (640,)" in message
    assert len(message) < 1500


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda w: without(w, "block2.layer.0.bn2.bias"), "missing: block2.layer.0.bn2.bias"),
        (
            lambda w: without(w, "running_var"),
            "missing: block1.layer.0.bn1.running_var, .* and 1 m",
        ),
        (lambda w: w | {"extra.weight": w["fc.bias"]}, "unexpected: extra.weight"),
        # Two answers to one question; neither is chosen.
        (lambda w: w | {"linear.bias": w["fc.bias"] * 0}, "unexpected: linear.bias"),
        (lambda w: {"linear.bias": w["fc.bias"] * 0} | w, "unexpected: linear.bias"),
        (
            lambda w: w | {"fc.bias": w["fc.bias"][:2]},
            "of another shape: fc.bias [(]2,[)] instead of [(]3,[)]",
        ),
        (
            lambda w: w | {"fc.bias": torch.ones(3, dtype=int)},
            "of another kind: fc.bias torch.Long",
        ),
        (lambda w: w | {"fc.bias": w["fc.bias"].to("meta")}, "of another kind: fc.bias torch.meta"),
        (
            lambda w: without(w, "fc.") | {"module.fc.weight": w["fc.weight"]},
            "missing: fc.w.* unexp",
        ),
    ],
)
def test_weights_that_do_not_fit(tmp_path, change, problem):
    path = save(tmp_path, change(dict(numbered(wide_resnet_shapes(10, 1, 3)))))
    assert re.search(f"; {problem}", refused(path))


def test_another_number_of_classes(tmp_path):
    path = save(tmp_path, numbered(wide_resnet_shapes(34, 10, 100)), "Chen2024Data_WRN_34_10.pt")
    message = refused(path, load=load_robustbench)
    assert message.endswith(
        "fc.weight (100, 640) instead of (10, 640), fc.bias (100,) instead of (10,)"
    )


@pytest.mark.parametrize("new", [True, False])
@pytest.mark.parametrize("kept", [0, 1, 2, 64, 0.1, 0.5, 0.9, -1])
def test_a_truncated_file(tmp_path, kept, new):
    path = save(tmp_path, random_weights(), _use_new_zipfile_serialization=new)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(kept * len(whole)) if isinstance(kept, float) else kept])
    assert "is it complete?" in refused(path)


@pytest.mark.parametrize("text", ["<!DOCTYPE html>\n<html>\n", "version 1\noid 5\n", "\n"])
def test_a_text_file(tmp_path, text):
    path = tmp_path / "file.pt"
    path.write_text(text)
    assert "that torch.save wrote" in refused(path)


@pytest.mark.parametrize("kind", ["safetensors", "ONNX", "torch.export"])
def test_a_file_of_another_kind_is_named(tmp_path, kind):
    path = tmp_path / f"model.{'pt2' if kind == 'torch.export' else kind.lower()}"
    path.write_bytes(bytes(64))
    assert refused(path).endswith(f"a file of {kind}; torch.save its state dict")


class MakesFolder:
    """What is pickled is a call of `os.mkdir`, to be made by whoever unpickles it."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


@pytest.mark.parametrize("new", [True, False])
@pytest.mark.parametrize("beside_weights", [True, False])
def test_code_in_a_file_is_not_executed(tmp_path, new, beside_weights):
    marker = tmp_path / "marker"
    content = MakesFolder(marker)
    if beside_weights:
        content = {"state_dict": random_weights(), "optimizer": content}
    name = "Chen2024Data_WRN_34_10.pt"
    path = save(tmp_path, content, name, _use_new_zipfile_serialization=new)
    for load in (load_checkpoint, load_robustbench):
        assert "it was not loaded" in refused(path, load=load)
    assert not marker.exists()
    torch.load(path, weights_only=False)  # the file does carry it
    assert marker.exists()


def test_a_pickled_module_is_not_loaded(tmp_path):
    message = refused(save(tmp_path, build_model(**TINY)))
    assert "ferdlib.models.preact.WideResNet" in message
    assert message.endswith("save the model's state_dict() where its code is")


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:FutureWarning")
def test_a_torchscript_program_is_not_loaded(tmp_path):
    torch.jit.script(torch.nn.Linear(2, 2)).save(tmp_path / "file.pt")
    assert "a TorchScript program; save the state_dict()" in refused(tmp_path / "file.pt")


@pytest.mark.parametrize("new", [True, False])
@pytest.mark.parametrize("scalar", [np.float64(0.5), np.float32(0.5), np.int64(3)])
def test_numpy_scalars_load_under_the_safe_globals_that_the_refusal_names(tmp_path, scalar, new):
    weights = random_weights()
    content = {"state_dict": weights, "best": scalar}
    path, allowed = save(tmp_path, content, _use_new_zipfile_serialization=new), []
    # An old file names one object at a time.
    for _ in range(3):
        with torch.serialization.safe_globals(allowed):
            message = refused(path)
        names = re.search(r"safe_globals[(]\[([\w., ]+)\][)]$", message)[1].split(", ")
        allowed += [pkgutil.resolve_name(name) for name in names]
        with torch.serialization.safe_globals(allowed), contextlib.suppress(ValueError):
            return assert_landed(load_checkpoint(path, **TINY), weights)
    pytest.fail(f"not loaded with {allowed}")


def endless():
    content = {}
    content["model"] = content
    return content


@pytest.mark.parametrize(
    "content",
    [
        *({}, {"epoch": 3}, {"state_dict": {}}, [1, 2], torch.zeros(3), {1: torch.zeros(3)}),
        {"optimizer": {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": []}},
        endless(),
    ],
)
def test_a_file_without_a_state_dict(tmp_path, content):
    message = refused(save(tmp_path, content))
    assert "which holds none" in message
    assert not isinstance(content, dict) or all(str(key) in message for key in content)


def test_several_networks_without_a_usual_name_are_refused(tmp_path):
    weights = random_weights()
    path = save(tmp_path, {"best": weights, "last": another(weights), "epoch": 3})
    assert "hold one wide_resnet_10_1" in refused(path)
    assert "with several, best, last; save" in refused(path)


def test_what_the_file_says_of_itself_is_refused_in_its_name(tmp_path):
    path = save(tmp_path, random_weights(), "wrn.pt")
    assert refused(path, load=load_robustbench, argument="name").endswith("got 'wrn'")
    for entries in ({"architecture": "resnet50", "num_classes": 3}, {"architecture": 5}):
        path = save(tmp_path, entries | {"state_dict": random_weights()})
        refused(path, argument="architecture", architecture=None, num_classes=None)


@pytest.mark.parametrize(
    "declared",
    [
        {"num_classes": 10**12},
        {"in_channels": 10**12},
        {"architecture": "small_cnn_1000000000000"},
        {"architecture": f"small_cnn_{'9' * 5000}"},
    ],
    ids=["classes", "channels", "width", "digits"],
)
def test_sizes_that_the_file_cannot_hold_are_not_believed(declared, tmp_path):
    """One number stands for 4 * 10^12 weights, of the shape that is declared."""
    weights = random_weights("small_cnn_4", 3)
    count = declared.get("num_classes", 3)
    weights |= {
        "fc.weight": torch.zeros(1).expand(count, 16),
        "fc.bias": torch.zeros(1).expand(count),
    }
    own = {"architecture": "small_cnn_4", "num_classes": 3, "in_channels": 3, "state_dict": weights}
    path = save(tmp_path, own | declared)
    message = refused(path, architecture=None, num_classes=None)
    assert "expected `path` to hold all weights of a small_cnn_" in message
    assert f"of {path.stat().st_size} bytes" in message


def test_a_flipped_bit_is_no_weight(tmp_path):
    path = save(tmp_path, random_weights())
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert "is it complete?" in refused(path)


def test_a_file_may_be_without_checksums(tmp_path):
    weights = random_weights()
    set_crc32_options(False)
    try:
        path = save(tmp_path, weights)
    finally:
        set_crc32_options(True)
    assert_landed(load_checkpoint(path, **TINY), weights)
