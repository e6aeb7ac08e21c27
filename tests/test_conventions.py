"""The conventions of docs/conventions.md: each line there names a test here, and each test has its line."""

import ast
import inspect
import re
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import make_tiny_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

import ferdlib
from ferdlib import attacks, augment, bottleneck, losses, metrics, models, reweight, synthesis
from ferdlib.evaluation import PROTOCOLS
from ferdlib.evaluation.attack import _start
from ferdlib.methods import rules

N, K = 6, 4


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


Z, REFERENCE = torch.randn(2, N, K, generator=seeded())
X, Y = torch.rand(N, 2, 5, 7, generator=seeded(1)), torch.arange(N) % K
ATTACKS = ("pgd", "fgsm", "cw_linf", "utae_pgd", "least_pgd_steps")
every_attack = pytest.mark.parametrize("name", ATTACKS)
# The arguments of each loss: logits z, reference logits t, labels y.
LOSSES = {"uniformity": "z", "confidence_penalty": "z", "kl_divergence": "tz", "distillation": "zt"}
LOSSES |= {"decoupled_kl": "zt", "masked_distillation": "zt", "ferd_distillation_loss": "zzt"}
LOSSES |= {"cross_entropy": "zy", "margin": "zy", "cw_margin": "zy"}
LOSSES |= {"trades": "zzy", "ard": "zzty", "rslad": "zzt", "iad": "zztty", "adaad": "zztt"}
LOSSES |= {"absld": "zzt", "mtard": "zztt", "bat": "zzzy"}
NEEDED = {"absld": {"adv_temperature": 2.0, "clean_temperature": 0.5}}
# Those that judge a batch, or are no loss.
OTHERS = {"BatchNormStatistics", "MTARDBalance", "class_temperatures", "class_variance"}
OTHERS |= {"ferd_generator_loss"}


def run(name, model, x=X, **keywords):
    if name == "autoattack":
        return attacks.autoattack(model, x, Y, num_classes=K, eps=0.5).x_adv
    target = REFERENCE if name == "utae_pgd" else Y
    found = getattr(attacks, name)(model, x, target, **keywords)
    return found[0] if name == "least_pgd_steps" else found


RANDOM = {name: partial(run, name, make_tiny_model(), random_start="uniform") for name in ATTACKS}
RANDOM["crop_flip"] = partial(augment.crop_flip, X)
RANDOM["sample_labels"] = partial(synthesis.sample_labels, torch.full((K,), 1 / K), 99)
RANDOM["noise_scale"] = partial(bottleneck.noise_scale, X, lambda z: z.mean((2, 3)), Y % 2, steps=2)


def test_images_are_float_batches_in_bounds():
    assert attacks.pgd(make_tiny_model(), X, Y).shape == (N, 2, 5, 7)
    for wrong, kind in [(X[0], ValueError), (2 * X - 1, ValueError), ((9 * X).int(), TypeError)]:
        with pytest.raises(kind, match="^pgd: expected `x`"):
            attacks.pgd(make_tiny_model(), wrong, Y)


def test_eps_counts_pixels_behind_normalisation():
    x, model = X.clamp(0.2, 0.8), models.Normalized(make_tiny_model(), [0.4, 0.5], [0.01, 9.0])
    largest = (attacks.pgd(model, x, Y, eps=0.1) - x).abs().amax((0, 2, 3))
    assert largest.tolist() == pytest.approx([0.1, 0.1], abs=1e-6)


@every_attack
def test_a_model_is_any_callable(name):
    model = make_tiny_model()
    x_adv = run(name, model, rng=seeded())
    assert torch.equal(x_adv, run(name, lambda x: model(x), rng=seeded()))


def test_pgd_hands_the_output_to_the_loss_unexamined():
    def pair(x):
        return make_tiny_model()(x), "more"

    def note(step, x_adv, output):
        seen.append(type(output))

    def loss(output, y):
        return losses.cross_entropy(output[0], y)

    seen, x_adv = [], attacks.pgd(make_tiny_model(), X, Y, rng=seeded())
    assert torch.equal(x_adv, attacks.pgd(pair, X, Y, loss=loss, rng=seeded(), on_step=note))
    assert seen == [tuple] * 10
    with pytest.raises(TypeError, match="^pgd: cross_entropy: expected `logits`"):
        attacks.pgd(pair, X, Y)


def test_labels_are_int64_and_classes_axis_1():
    assert torch.equal(losses.cross_entropy(Z, Y), F.cross_entropy(Z, Y, reduction="none"))
    for wrong, kind in [(Y.int(), TypeError), (Y[:, None], ValueError), (Y + 1, ValueError)]:
        with pytest.raises(kind, match="^margin: expected `targets`"):
            losses.margin(Z, wrong)


def test_losses_return_one_value_per_sample():
    assert set(losses.__all__) == {*LOSSES, *OTHERS}
    for name, letters in LOSSES.items():
        arguments = [{"z": Z, "t": REFERENCE, "y": Y}[letter] for letter in letters]
        loss = partial(getattr(losses, name), **NEEDED.get(name, {}))
        values = loss(*arguments)
        assert values.shape == (N,), name
        alone = [loss(*(a[[i]] for a in arguments)) for i in range(N)]
        torch.testing.assert_close(values, torch.cat(alone))


def test_no_hidden_factor():
    for t in (1.0, 5.0):
        log_p, log_q = (REFERENCE / t).log_softmax(1), (Z / t).log_softmax(1)
        by_hand = (log_p.exp() * (log_p - log_q)).sum(1)
        torch.testing.assert_close(losses.kl_divergence(REFERENCE, Z, temperature=t), by_hand)


def test_class_quantities_have_the_declared_length_and_are_used_by_label():
    w, few = reweight.ClassWeights(K, reweight.lps_power), torch.tensor([0, 1])
    w(few, few)
    w.step()
    assert metrics.class_accuracy(metrics.confusion_matrix(few, few, K)).shape == (K,)
    torch.testing.assert_close(w(torch.ones(N), Y), w.weights.float()[Y])
    with pytest.raises(ValueError, match="^confusion_matrix: expected `targets` in 0..1"):
        metrics.confusion_matrix(few, few + 1, 2)


def test_absent_classes_are_neutral():
    two = torch.tensor([1.0, 3.0, torch.nan])
    assert metrics.class_accuracy(torch.tensor([[2, 0], [0, 0]]))[1].isnan()
    assert reweight.ClassMean(2).compute().isnan().all()
    assert reweight.lps_power(two)[2] == 1
    for rule in (reweight.lps_linear, reweight.lps_sigmoid, reweight.lps_tanh):
        assert rule(two, 9)[2] == 1
    for rule in (reweight.margin_softmax, reweight.margin_minmax):
        assert torch.equal(rule(two), rule(torch.tensor([1.0, 3.0, 2.0])))


def test_probabilities_sum_to_1_and_weights_have_mean_1():
    statistic = torch.tensor([0.5, 3.0, 7.0, torch.nan])
    for rule in (reweight.margin_softmax, reweight.margin_minmax):
        assert rule(statistic).sum().item() == pytest.approx(1)
    for rule in (reweight.lps_linear, reweight.lps_sigmoid, reweight.lps_tanh):
        assert rule(statistic, 9).mean().item() == pytest.approx(1)
    w = reweight.lps_power(statistic)
    assert w.mean().item() == pytest.approx(1)
    torch.testing.assert_close(reweight.normalize(w, to="sum"), w / 4)
    torch.testing.assert_close(reweight.normalize(w / 4, to="mean"), w)


def test_confusion_rows_are_true_and_the_average_is_macro():
    confusion = metrics.confusion_matrix(torch.tensor([2]), torch.tensor([0]), 3)
    assert confusion.nonzero().tolist() == [[0, 2]]
    accuracy = metrics.class_accuracy(torch.tensor([[98, 0, 0], [1, 1, 0], [0, 0, 0]]))
    assert metrics.average(accuracy) == 0.75


@every_attack
def test_attacks_ascend(name):
    def objective(x):
        z = make_tiny_model()(x)
        if name == "utae_pgd":
            return losses.distillation(z, REFERENCE) - 0.5 * losses.uniformity(z)
        return losses.cw_margin(z, Y) if name == "cw_linf" else losses.cross_entropy(z, Y)

    assert (objective(run(name, make_tiny_model())) > objective(X)).all()


def trace(model):
    weights = [
        (p.requires_grad, None if p.grad is None else p.grad.sum()) for p in model.parameters()
    ]
    modules = [
        (m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()
    ]
    modes = (
        torch.is_autocast_enabled("cpu"),
        torch.is_grad_enabled(),
        torch.get_rng_state().tolist(),
    )
    return weights, modules, modes, [t.tolist() for t in model.state_dict().values()]


@pytest.mark.parametrize("name", [*ATTACKS, "autoattack"])
@pytest.mark.parametrize("autocast", [False, True])
def test_attacks_leave_no_trace(name, autocast, capfd):
    def fail(*_):
        raise KeyError("from inside")

    model = (
        make_tiny_model().train()
    )  # with mixed flags, a frozen layer and a gradient in the making
    model[1].eval()
    model[0].weight.requires_grad_(False)
    model[9].weight.grad = torch.ones_like(model[9].weight)
    with torch.autocast("cpu", enabled=autocast):
        before = trace(model)
        assert not torch.equal(run(name, model, rng=seeded()), X)
        assert trace(model) == before
        model[6].register_forward_hook(fail)
        before = trace(model)
        with pytest.raises(KeyError, match="from inside"):
            run(name, model, rng=seeded())
        assert trace(model) == before
    assert capfd.readouterr() == ("", "")


@every_attack
def test_attacks_work_under_no_grad(name):
    with torch.no_grad():
        x_adv = run(name, make_tiny_model(), rng=seeded())
    assert torch.equal(x_adv, run(name, make_tiny_model(), rng=seeded()))
    assert not torch.equal(x_adv, X)


@every_attack
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_attacks_follow_dtype_and_device(name, dtype):
    def note(step, x_adv, logits):
        seen.add((x_adv.dtype, logits.dtype))

    seen, x = set(), X.to(dtype)
    x_adv = run(name, make_tiny_model().to(dtype), x, on_step=note)
    assert (x_adv.dtype, x_adv.device, x_adv.requires_grad) == (dtype, x.device, False)
    assert seen == {(torch.promote_types(dtype, torch.float32), dtype)}


@every_attack
def test_eval_mode_unless_asked_otherwise(name):
    model, seen = make_tiny_model().train(), []
    model[1].register_forward_pre_hook(lambda module, _: seen.append(module.training))
    run(name, model)
    assert not any(seen)
    mean = model[1].running_mean.clone()
    run(name, model, train_mode=True)
    assert seen[-1]
    assert not torch.equal(model[1].running_mean, mean)


@pytest.mark.parametrize("function", RANDOM.values(), ids=RANDOM)
def test_noise_comes_from_rng_or_from_torchs_default_generator(function):
    torch.manual_seed(3)
    first, second = function(), function()
    torch.manual_seed(3)
    assert torch.equal(first, function())
    assert not torch.equal(first, second)
    before, rng = torch.get_rng_state(), seeded()
    first, second = function(rng=rng), function(rng=rng)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, function(rng=seeded()))
    assert not torch.equal(first, second)


def test_noise_is_drawn_on_the_device_of_rng():
    states = [seeded().get_state()]
    for device in (
        "cpu",
        "meta",
    ):  # weights on meta hold no numbers, yet theirs are drawn on the CPU
        rng = seeded()
        synthesis.Generator((1, 8, 8), latent_dim=3, width=2).to(device).reset(rng)
        states.append(rng.get_state())
    assert torch.equal(states[1], states[2])
    assert not torch.equal(states[0], states[1])


def test_nothing_seeds_the_global_generator():
    seeds = re.compile(r"fork_rng|np\.random|^random\.seed|manual_seed|\.seed(_all)?$")
    found = set()
    for path in Path(ferdlib.__file__).parent.rglob("*.py"):
        # AutoAttack gives the caller's state back; a command is the only user of its process.
        if path.name == "autoattack.py" or path.parent.name == "recipes":
            continue
        nodes = ast.walk(ast.parse(path.read_text("utf-8")))
        called = [ast.unparse(n.func) for n in nodes if isinstance(n, ast.Call)]
        found |= {name for name in called if seeds.search(name)}
    assert found == {"torch.Generator().manual_seed", "own.manual_seed"}


def test_tensors_are_made_on_a_named_device():
    made = {"arange", "empty", "eye", "full", "linspace", "ones", "rand", "randint", "randn"}
    made |= {"randperm", "tensor", "zeros"}
    for path in Path(ferdlib.__file__).parent.rglob("*.py"):
        # A command is the only user of its process.
        if path.parent.name != "recipes":
            for node in ast.walk(ast.parse(path.read_text("utf-8"))):
                call = ast.unparse(node.func).partition(".") if isinstance(node, ast.Call) else ()
                if call and call[0] == "torch" and call[2] in made:
                    assert "device" in {k.arg for k in node.keywords}, f"{path}:{node.lineno}"


def test_what_is_printed_is_latin_1():
    for path in Path(ferdlib.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            # A docstring is an expression of its own.
            for text in () if isinstance(node, ast.Expr) else ast.iter_child_nodes(node):
                if isinstance(text, ast.Constant) and isinstance(text.value, str):
                    text.value.encode("latin-1")


class NoFloat64(TorchDispatchMode):
    """The device "meta" as one that has no float64."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._local_scalar_dense.default:
            return True  # a check of values is passed
        out = function(*args, **(kwargs or {}))
        for tensor in tree_flatten(out)[0]:
            if isinstance(tensor, torch.Tensor):
                assert (tensor.device.type, tensor.dtype) != ("meta", torch.float64)
        return out


def test_nothing_is_float64_on_a_device_without_it():
    z, y, p = Z.to("meta"), Y.to("meta"), torch.ones(K, device="meta") / K
    mean, weights = reweight.ClassMean(K), reweight.ClassWeights(K, reweight.lps_power)
    balance, spec = losses.MTARDBalance(), PROTOCOLS["quick"].attacks[1]
    balance.initial_losses = torch.ones(2, dtype=torch.float64)
    with NoFloat64():
        mean.update(z[:, 0], y)
        mean.merge(reweight.ClassMean(K))
        weights(z[:, 0], y)
        balance.update(z.mean(), z.mean())
        for rule in (metrics.average, reweight.normalize, partial(metrics.inheritance_ratio, p)):
            rule(p)
        for name in ("CFA", "DAFA", "FRL", "WAT"):
            rule = getattr(rules, name)()
            rule.bind(K)
            rule.ball(0.1, 0.02, y)
            rule.combine(z[:, 0], z, y)
        assert _start(spec, 0, 0, torch.arange(N), X.to("meta")).device.type == "meta"
    assert mean.sums.dtype == torch.float32


def public_functions():
    for module in (attacks, augment, bottleneck, losses, metrics, models, reweight, synthesis):
        for name, value in inspect.getmembers(module, inspect.isfunction):
            # A deprecated name warns before anything else.
            own = value.__module__.startswith(module.__name__)
            if own and not name.startswith("_") and not hasattr(value, "__deprecated__"):
                yield value


@pytest.mark.parametrize("function", list(public_functions()), ids=lambda f: f.__name__)
def test_a_wrong_type_is_a_type_error_with_the_functions_name(function):
    parameters = inspect.signature(function).parameters
    needed = [n for n, p in parameters.items() if p.default is p.empty] or list(parameters)
    with pytest.raises(TypeError) as error:
        function(**dict.fromkeys(needed, object()))
    start = re.match(r"(\w+): expected `(\w+)`", str(error.value))
    assert start[1] == function.__name__
    assert start[2] in needed


def test_a_wrong_value_is_a_value_error_and_a_wrong_moment_a_runtime_error():
    for kind, start, call in [
        (ValueError, "margin: expected `targets`", lambda: losses.margin(Z, Y[:2])),
        (ValueError, "fgsm: expected `eps`", lambda: attacks.fgsm(len, X, Y, eps=-1.0)),
        (ValueError, "average: expected `acc`", lambda: metrics.average(torch.full((2,), 80.0))),
        (ValueError, "crop_flip: expected `x`", lambda: augment.crop_flip(X[0])),
        (RuntimeError, "ImagePool.sample: expected", lambda: synthesis.ImagePool().sample(1)),
        (RuntimeError, "ClassWeights.step: expected", reweight.ClassWeights(2, len).step),
    ]:
        with pytest.raises(kind, match="^" + start):
            call()


def test_lines_and_tests_name_each_other():
    document = (Path(__file__).parents[1] / "docs" / "conventions.md").read_text("utf-8")
    lines = re.findall(r"^- .*\n(?:  .*\n)*", document, flags=re.MULTILINE)
    named = [re.search(r"`tests/test_conventions\.py::(\w+)`\s*\Z", line)[1] for line in lines]
    nodes = ast.parse(Path(__file__).read_text("utf-8")).body
    tests = {n.name for n in nodes if isinstance(n, ast.FunctionDef) and n.name.startswith("test_")}
    assert set(named) == tests
