"""Every flow of the registry: its card is true, a thin version trains, samples, goes through files; who refuses it."""

import copy
import dataclasses
import importlib.util
import pickle
import re
from pathlib import Path

import pytest
import torch

import zoo
from invertible import Dequantize, Flow, Recompute, Reconstruct, Store
from tests.zoo_networks import randomize
from zoo import registry
from zoo.analysis.subject import open_subject
from zoo.building import build
from zoo.convert import main as convert
from zoo.dry_run import cost_of, flops_of
from zoo.errors import InputError, WeightsError
from zoo.flows import cards
from zoo.pretrained import from_pretrained, save_pretrained
from zoo.recipes import RECIPES
from zoo.run import BACKPROP
from zoo.weights import Transforms, Weights, save_weights

ROOT = Path(__file__).parents[1]

THIN = {
    "iresnet": {"features": 2, "blocks": 2, "width": 4, "depth": 1, "lipschitz": 0.5, "log_det": "exact"},
    "nice": {"features": 3, "couplings": 3, "width": 4},
    "spline_flow": {"features": 3, "couplings": 3, "width": 4, "bins": 3, "mixing": "linear"},
    "glow": {"shape": (1, 4, 4), "levels": 2, "steps": 2, "width": 4, "values": 5},
    "realnvp": {"shape": (1, 4, 4), "levels": 2, "blocks": 1, "width": 4, "values": 5},
}
"""Options that make a small version of each flow, which is quick."""

every_flow = pytest.mark.parametrize("name", zoo.names(kind="flow"))


def thin(name, **options):
    """A small version of a flow, with parameters that are not those of its initialisation, and a batch for it."""
    if name not in THIN:
        pytest.fail(f'add to THIN in tests/test_zoo_flows.py a line that makes the flow small: "{name}": {{...}},')
    torch.manual_seed(0)
    flow = zoo.create(name, **THIN[name], **options)
    x = torch.rand(6, *flow().event_shape) if not rounds(flow) else torch.randint(5, (6, *flow().event_shape)).float()
    flow(value=x)  # statistics of the first batch
    return randomize(flow, 0.05), x


def rounds(flow):
    return any(isinstance(part, Dequantize) for part in flow.modules())


def continuous(flow):
    """The flow of what the noise makes of whole numbers: without the check of their shape, and without the noise."""
    return Flow(flow.transform[2:], flow.base) if rounds(flow) else flow


def meta(name, **options):
    with torch.device("meta"):
        return zoo.create(name, **options)


def test_every_flow_has_a_card_and_nothing_else_has():
    missing = set(zoo.names(kind="flow")) - cards.FLOWS.keys()
    assert not missing, f"add cards for {sorted(missing)} to zoo/flows/cards.py"
    assert cards.FLOWS.keys() == set(zoo.names(kind="flow"))
    assert all(each.name == name for name, each in cards.FLOWS.items())


@every_flow
def test_its_card_is_true(name):
    card, flow = zoo.card(name), meta(name).eval()
    assert sum(p.numel() for p in flow.parameters()) == card.parameters
    assert "https://" in card.source
    assert (card.inverse == "rounds") == rounds(flow)


@pytest.mark.slow
@every_flow
def test_its_operations_and_bytes_are_counted(name):
    card, flow = zoo.card(name), meta(name)
    assert flow().event_shape == card.shape
    assert flops_of(flow.eval(), card.shape) == card.flops
    flow.train()
    assert card.activations.keys() == BACKPROP.keys()
    for kept, strategy in BACKPROP.items():
        flow.transform.backprop = strategy
        assert cost_of(flow, card.shape).per_image == pytest.approx(card.activations[kept], rel=0.02), kept


@every_flow
def test_it_remembers_what_it_was_built_from(name):
    with torch.device("meta"):
        flow = getattr(zoo, name)(**THIN[name])
    config = zoo.config_of(flow)
    assert config.model == name
    assert config.options.items() >= THIN[name].items()
    again = meta(name, **config.options)
    assert zoo.config_of(again) == config
    assert [p.shape for p in again.parameters()] == [p.shape for p in flow.parameters()]


@every_flow
def test_data_come_back_and_the_log_determinant_is_autograds(name):
    flow, x = thin(name)
    flow = continuous(flow.double().eval())
    if rounds(zoo.create(name, **THIN[name])):
        x = (x.double() + torch.rand(x.shape, dtype=torch.float64)) / 5
    x = x.double()[:2]
    z, log_det = flow.transform.forward_and_log_det(x)
    torch.testing.assert_close(flow.transform.inverse(z), x, rtol=1e-9, atol=1e-9)

    def flat(each):
        parts, todo = [], [flow.transform(each.reshape(1, *x.shape[1:]))]
        while todo:
            part = todo.pop()
            todo.extend(part) if isinstance(part, tuple) else parts.append(part.flatten())
        return torch.cat(parts)

    jacobians = torch.stack([torch.func.jacrev(flat)(each.flatten()) for each in x])
    torch.testing.assert_close(log_det, torch.linalg.slogdet(jacobians).logabsdet, rtol=1e-8, atol=1e-8)


@every_flow
def test_samples_have_the_density_that_values_have(name):
    flow, x = thin(name)
    flow = flow.double().eval()
    drawn = flow().sample((3,))
    assert drawn.shape == (3, *x.shape[1:])
    assert drawn.dtype == torch.float64
    assert not rounds(flow) or bool((drawn == drawn.round()).all())
    density = continuous(flow)()
    y, log_prob = density.rsample_and_log_prob((4,))
    torch.testing.assert_close(density.log_prob(y), log_prob, rtol=1e-8, atol=1e-8)


@every_flow
def test_a_training_step_leaves_the_same_behind_whatever_is_kept(name):
    flow, x = thin(name)
    flow, x, found = flow.double(), x.double(), []
    for strategy in (Store(), Recompute(), Reconstruct()):
        flow.transform.backprop = strategy
        flow.zero_grad()
        torch.manual_seed(1)
        loss = -flow(value=x).mean()
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in flow.parameters())])
    for other in found[1:]:
        for a, b in zip(other, found[0], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)
    assert flow.transform.drift is not None


@every_flow
def test_it_goes_through_copies_pickling_and_files(name, tmp_path):
    flow, x = thin(name)
    for again in (
        copy.deepcopy(flow),
        pickle.loads(pickle.dumps(flow)),  # noqa: S301
        from_pretrained(save_pretrained(flow, tmp_path)),
    ):
        assert zoo.config_of(again) == zoo.config_of(flow)
        found, expected = again.state_dict(), flow.state_dict()
        assert list(found) == list(expected)
        assert all(torch.equal(t, expected[key]) for key, t in found.items())
        likelihoods = []
        for each in (again, flow):
            torch.manual_seed(0)
            likelihoods.append(each.eval()(value=x))
        assert torch.equal(*likelihoods)


def test_published_weights_bring_their_classes(tmp_path, monkeypatch):
    """The number of classes is an option of a flow like any other; of a classifier it may be replaced."""
    flow = zoo.create("glow", **THIN["glow"], num_classes=3)
    save_weights(flow, tmp_path / "flow.safetensors")
    monkeypatch.setattr(registry, "fetch", lambda _: tmp_path / "flow.safetensors")
    looks = Transforms(resize=4, crop=4)
    entry = Weights("glow", "mine", "https://example.org/x", "0" * 64, looks, {**THIN["glow"], "num_classes": 3})
    for options in ({}, {"num_classes": 3}):
        again = zoo.create("glow", weights=entry, **options)
        assert all(torch.equal(t, again.state_dict()[key]) for key, t in flow.state_dict().items())
    with pytest.raises(WeightsError, match="does not fit this Flow"):
        zoo.create("glow", weights=entry, num_classes=4)


def test_the_trainer_the_analyses_and_fine_tuning_refuse_it(tmp_path, capsys):
    with pytest.raises(InputError, match=r"^glow is a flow, a density; what is trained here classifies images$"):
        build(dataclasses.replace(RECIPES["digits"], model="glow"), num_classes=10)
    flow, _ = thin("glow")
    folder = save_pretrained(flow, tmp_path / "flow")
    words = f"{folder} holds glow, a flow; the analyses are of networks that classify images"
    with pytest.raises(InputError, match=f"^{re.escape(words)}$"):
        open_subject(folder)
    with pytest.raises(ValueError, match="expected a network with a linear classifier"):
        zoo.replace_head(flow, 10)
    spec = importlib.util.spec_from_file_location("fine_tune", ROOT / "examples" / "fine_tune.py")
    fine_tune = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fine_tune)
    with pytest.raises(InputError, match=r"^Flow has no body to freeze; take an i-RevNet$"):
        fine_tune.prepared(flow, None, torch.device("cpu"))
    assert convert(["to-released", str(folder / "model.safetensors"), str(tmp_path / "out.pth")]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert not (tmp_path / "out.pth").exists()
