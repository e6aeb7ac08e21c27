"""Checkpoints that say less than a model needs: their normalisation, and which of two functions they are."""

import pytest
import torch

from ferdlib.models import Normalized, build_model, load_checkpoint

MEAN, STD = torch.tensor([0.5, 0.25, 0.75]), torch.tensor([0.25, 0.5, 0.125])
SMALL = {"architecture": "small_cnn_2", "num_classes": 3}


@pytest.fixture(scope="module")
def network():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build_model(**SMALL)
        model(torch.randn(8, 3, 8, 8))
    return model.eval()


def named(network, prefix="", **others):
    return {prefix + key: value for key, value in network.state_dict().items()} | others


def loaded(folder, content, **arguments):
    torch.save(content, folder / "file.pt")
    return load_checkpoint(folder / "file.pt", **SMALL | arguments)


def image_shaped(values):
    return values.reshape(1, 3, 1, 1)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda n: named(n, mu=image_shaped(MEAN), sigma=image_shaped(STD)),  # as RobustBench
        lambda n: named(n, "model.", **{"normalize.mean": MEAN, "normalize.std": STD}),
        lambda n: named(n, "1.", **{"0.mean": image_shaped(MEAN), "0.std": image_shaped(STD)}),
        lambda n: {
            "state_dict": named(n, "module.net.", **{"module.mean": MEAN, "module.std": STD})
        },
        lambda n: {"state_dict": named(n), "mean": MEAN.tolist(), "std": STD.tolist()},
        # As MadryLab's robustness, which keeps all of it twice.
        lambda n: {
            "model": named(n, "module.model.")
            | named(n, "module.attacker.model.")
            | {"module.normalizer.new_mean": MEAN, "module.normalizer.new_std": STD}
            | {"module.attacker.normalize.new_mean": MEAN}
            | {"module.attacker.normalize.new_std": STD}
        },
    ],
)
def test_a_mean_and_a_std_beside_the_weights_come_back_as_normalisation(tmp_path, network, wrap):
    model = loaded(tmp_path, wrap(network))
    assert isinstance(model, Normalized)
    assert not any(module.training for module in model.modules())
    x = torch.rand(2, 3, 8, 8)
    by_hand = torch.stack([(x[:, c] - MEAN[c]) / STD[c] for c in range(3)], dim=1)
    assert torch.equal(model(x), network(by_hand))


def test_one_number_normalises_all_channels(tmp_path, network):
    content = named(network, mean=torch.tensor(0.5), std=torch.tensor([0.25]))
    x = torch.rand(2, 3, 8, 8)
    assert torch.equal(loaded(tmp_path, content)(x), network((x - 0.5) / 0.25))


def test_results_beside_the_weights_are_no_normalisation(tmp_path, network):
    content = {"state_dict": named(network), "mean": 0.9, "std": 0.1, "test_mean": [0.9] * 3}
    assert type(loaded(tmp_path, content)) is type(network)


BATCHNORM = {f"0.{key}": value for key, value in torch.nn.BatchNorm2d(3).state_dict().items()}


@pytest.mark.parametrize(
    ("others", "problem"),
    [
        (BATCHNORM, "unexpected: 0.weight, .*0.running_mean.*; if these normalise the images"),
        ({"mean": MEAN}, "unexpected: mean; if these normalise the images"),
        (
            {"mean": 255 * MEAN, "std": 255 * STD},
            r"mean [(]127.5, 63.75, 191.2[)] and std [(]63.75",
        ),
        ({"mean": MEAN, "std": 0 * STD}, r"std [(]0, 0, 0[)]"),
        ({"mean": MEAN, "std": STD / 0}, r"std [(]inf, inf, inf[)]"),
        ({"mean": MEAN.to("meta"), "std": STD}, "unexpected: mean, std; if these"),
        ({"mean": MEAN[:2], "std": STD[:2]}, r"mean [(]0.5, 0.25[)]"),
        ({"mean": MEAN, "std": STD, "mu": STD, "sigma": STD}, " with mean, mu"),
    ],
)
def test_a_normalisation_that_cannot_be_kept_is_refused_with_the_remedy(
    tmp_path, network, others, problem
):
    remedy = r"save the network alone and wrap it in models.Normalized$"
    with pytest.raises(
        ValueError, match=f"^load_checkpoint: expected `path`.* got .*{problem}.*{remedy}"
    ):
        loaded(tmp_path, named(network, "net.", **others))


def words(caplog):
    found = [record.getMessage() for record in caplog.records]
    caplog.clear()
    return found


def test_a_first_module_without_weights_gets_a_word(tmp_path, network, caplog):
    assert type(loaded(tmp_path, named(network, "1."))) is type(network)
    (message,) = words(caplog)
    assert "'1.', so another module came first" in message
    assert "models.Normalized" in message
    loaded(tmp_path, named(network, "0."))
    loaded(tmp_path, named(network, "1.", mean=MEAN, std=STD))
    assert words(caplog) == []


@pytest.mark.parametrize("name", ["preact_resnet18", "preact_resnet34"])
def test_two_functions_with_the_same_names_get_a_word(tmp_path, name, caplog):
    content = build_model(name, 3).state_dict()
    loaded(tmp_path, content, architecture=name)
    (message,) = words(caplog)
    assert f"two public networks have the names and shapes of a {name}; " in message
    assert message.endswith(f"load it as {name}_input_shortcut")
    # Who asks for the rarer one knows, and a file of this package says which it is.
    loaded(tmp_path, content, architecture=f"{name}_input_shortcut")
    loaded(tmp_path, {"architecture": name, "state_dict": content}, architecture=None)
    assert words(caplog) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("true", ["preact_resnet18", "preact_resnet18_input_shortcut"])
def test_batchnorm_statistics_tell_the_two_functions_apart(tmp_path, true, dtype, caplog):
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = build_model(true, 3)
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.weight.normal_(1, 0.3)
                module.bias.normal_(0, 0.3)
                module.momentum = 1  # the statistics of one batch
        model(torch.rand(8, 3, 32, 32))
    other = ({"preact_resnet18", "preact_resnet18_input_shortcut"} - {true}).pop()
    content = model.to(dtype).state_dict()
    loaded(tmp_path, content, architecture=true)
    assert words(caplog) == []
    loaded(tmp_path, content, architecture=other)
    (message,) = words(caplog)
    assert f"those of a {true}, which is another function than a {other} " in message
    # Statistics that belong to neither tell nothing.
    content = {k: torch.zeros_like(v) if "running_mean" in k else v for k, v in content.items()}
    loaded(tmp_path, content, architecture="preact_resnet18")
    assert "two public networks" in words(caplog)[0]
