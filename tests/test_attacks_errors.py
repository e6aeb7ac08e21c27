"""Wrong arguments and broken models: the error says which function and which argument."""

import pytest
import torch

from ferdlib.attacks import autoattack, cw_linf, fgsm, least_pgd_steps, pgd, utae_pgd

K = 3
ASCENTS = {f.__name__: f for f in (pgd, fgsm, cw_linf, least_pgd_steps)}
ASCENTS["utae_pgd"] = lambda model, x, y, **rest: utae_pgd(model, x, **rest)
ATTACKS = ASCENTS | {
    "autoattack": lambda model, x, y, **rest: autoattack(model, x, y, num_classes=K, **rest)
}
ascents = pytest.mark.parametrize("attack", list(ASCENTS))
attacks = pytest.mark.parametrize("attack", list(ATTACKS))


def batch():
    return torch.rand(2, 2, 6, 5, generator=torch.Generator().manual_seed(0))


def answers(model, x):
    with torch.no_grad():
        return model(x).argmax(dim=1)


@attacks
@pytest.mark.parametrize("calls", [0, 1])
def test_nan_logits_are_no_robustness(tiny_model, attack, calls):
    model, x = tiny_model(num_classes=K), batch()
    seen = []

    def broken(images):
        seen.append(len(images))
        return model(images) * (torch.nan if len(seen) > calls else 1.0)

    if attack != "fgsm" or calls == 0:
        with pytest.raises(RuntimeError, match=rf"^{attack}: .*NaN"):
            ATTACKS[attack](broken, x, answers(model, x))


@ascents
def test_a_model_that_detaches_is_found(tiny_model, attack):
    model = tiny_model(num_classes=K)
    with pytest.raises(ValueError, match=rf"^{attack}: .*without a gradient"):
        ASCENTS[attack](lambda images: model(images).detach(), batch(), torch.tensor([0, 1]))


@attacks
@pytest.mark.parametrize("shape", [(2, 1), (2,), (2, K, 1)])
def test_outputs_that_are_no_logits_are_found(attack, shape):
    def model(images):
        return images.sum() * torch.ones(shape)

    with pytest.raises(
        ValueError, match=r"^\w+: .*`(logits|reference_logits|model\(x\))` of shape"
    ):
        ATTACKS[attack](model, batch(), torch.tensor([0, 0]))


def spoil(x, value):
    x = x.clone()
    x[0, 0, 0, 0] = value
    return x


X = batch()
WRONG = {
    "rank 3": ({"x": X[0]}, ValueError, "x"),
    "integer images": ({"x": (255 * X).byte()}, TypeError, "x"),
    "no tensor": ({"x": X.numpy()}, TypeError, "x"),
    "nan images": ({"x": spoil(X, float("nan"))}, ValueError, "x"),
    "infinite images": ({"x": spoil(X, float("inf"))}, ValueError, "x"),
    "images above 1": ({"x": spoil(X, 1.01)}, ValueError, "x"),
    "images below 0": ({"x": spoil(X, -0.01)}, ValueError, "x"),
    "negative eps": ({"eps": -0.1}, ValueError, "eps"),
    "nan eps": ({"eps": float("nan")}, ValueError, "eps"),
    "eps as text": ({"eps": "8/255"}, TypeError, "eps"),
}
WRONG_ASCENT = WRONG | {
    "outside other bounds": ({"bounds": (0.4, 0.6)}, ValueError, "x"),
    "swapped bounds": ({"bounds": (1.0, 0.0)}, ValueError, "bounds"),
    "one bound": ({"bounds": 1.0}, TypeError, "bounds"),
    "shape of eps": ({"eps": torch.tensor([0.1, 0.1, 0.1])}, ValueError, "eps"),
    "one negative eps": ({"eps": torch.tensor([0.1, -0.1])}, ValueError, "eps"),
    "integer eps": ({"eps": torch.tensor([1, 1])}, TypeError, "eps"),
    "unknown start": ({"random_start": "gaussian"}, ValueError, "random_start"),
    "shape of the start": ({"random_start": X[:1]}, ValueError, "random_start"),
    "nan start": ({"random_start": spoil(X, float("nan"))}, ValueError, "random_start"),
    "seed as rng": ({"rng": 0}, TypeError, "rng"),
}
WRONG_TARGETS = {
    "too few": ({"y": torch.tensor([0])}, ValueError, "targets"),
    "scalar": ({"y": torch.tensor(0)}, ValueError, "targets"),
    "list": ({"y": [0, 1]}, TypeError, "targets"),
    "int32": ({"y": torch.tensor([0, 1], dtype=torch.int32)}, TypeError, "targets"),
    "out of range": ({"y": torch.tensor([0, K])}, ValueError, "targets"),
    "negative": ({"y": torch.tensor([0, -1])}, ValueError, "targets"),
}
CASES = [(a, WRONG_ASCENT[case]) for a in ASCENTS for case in WRONG_ASCENT]
CASES += [("autoattack", case) for case in WRONG.values()]
CASES += [(a, case) for a in ATTACKS if a != "utae_pgd" for case in WRONG_TARGETS.values()]
CASES += [
    (a, ({name: value}, error, name))
    for a in ("pgd", "cw_linf", "utae_pgd", "least_pgd_steps")
    for name, value, error in [("step_size", -0.1, ValueError)]
]


@pytest.mark.parametrize(("attack", "case"), CASES)
def test_errors_name_function_and_argument(tiny_model, attack, case):
    change, error, argument = case
    arguments = {"x": X, "y": torch.tensor([0, 1])} | change
    # Targets are the loss's: it is the one that looks at them, under its own public name.
    names = f"({attack}|cross_entropy|cw_margin)" if argument == "targets" else attack
    x, y = arguments.pop("x"), arguments.pop("y")
    with pytest.raises(error, match=rf"^{names}: .*`{argument}(\[\d\])?`"):
        ATTACKS[attack](tiny_model(num_classes=K), x, y, **arguments)
