"""Features by depth, and what tells the classes apart: against hooks by hand, scikit-learn and scipy."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.spatial.distance import pdist, squareform
from sklearn.decomposition import PCA
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler
from sklearn.svm import LinearSVC

import zoo
from tests.zoo_networks import randomize
from zoo.analysis import (
    Contraction,
    Scores,
    Separation,
    accuracy_by_components,
    averages_by_depth,
    best_cost,
    blocks_of,
    choose,
    class_distances,
    class_scores,
    contraction_by_depth,
    draw_contraction,
    draw_separation,
    effective_dimension,
    features_by_depth,
    open_subject,
    separation_by_depth,
    standardized,
)
from zoo.analysis import depth as depth_module
from zoo.analysis.__main__ import main
from zoo.analysis.classifiers import spread_over_classes
from zoo.data import open_data
from zoo.errors import InputError
from zoo.pretrained import save_pretrained


def network(name="irevnet_small", classes=3, **options):
    """In eval, with statistics and weights that are not those of initialisation."""
    if name == "irevnet_small":
        options = {"blocks": (1, 1)} | options
    net = randomize(zoo.create(name, num_classes=classes, **options), 0.3)
    net(torch.rand(16, 3, 8, 8))
    return net.eval().requires_grad_(False)


def images(folder, each=(8, 4), classes="abc", size=8):
    """A tree of images whose classes differ in colour."""
    generator = np.random.default_rng(0)
    for split, count in zip(("train", "val"), each, strict=True):
        for number, name in enumerate(classes):
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = generator.integers(0, 256, (size, size, 3), dtype=np.uint8)
                pixels[..., number % 3] //= 2
                Image.fromarray(pixels).save(folder / split / name / f"{i}.png")
    return folder


@pytest.fixture
def setting(tmp_path):
    """A network that was written, and images."""
    save_pretrained(network(), tmp_path / "net")
    return SimpleNamespace(root=tmp_path, data=images(tmp_path / "data"), net=tmp_path / "net")


def kept(setting, size=8, **options):
    """Features of the training and of the validation images."""
    subject, data = open_subject(setting.net, size=size), open_data(setting.data)
    found = [
        features_by_depth(subject, each, range(len(each)), setting.root / "features", batch=5, **options)
        for each in (data.training, data.validation)
    ]
    return subject, data, *found


@pytest.mark.parametrize("grid", [None, "exact"])
def test_the_averages_of_an_irevnet_are_those_of_its_trace(grid):
    net, x = network(), torch.rand(4, 3, 8, 8)
    net.grid = grid
    found, logits = averages_by_depth(net.train(), x)
    assert net.training
    assert not any(part._forward_hooks for part in net.modules())
    net.eval()
    values = {f"body.{name}": value for name, value in net.trace(x)}
    for name, each in zip(blocks_of(net), found, strict=True):
        expected = torch.cat([stream.mean((2, 3)) for stream in values[name]], dim=1)
        assert torch.allclose(each.double(), expected.double(), rtol=1e-5, atol=1e-6)
        assert each.dtype == torch.float32
    assert torch.allclose(found[-1], net.features(x).mean((2, 3)).float(), rtol=1e-5, atol=1e-6)
    assert torch.equal(logits, net(x))


@pytest.mark.parametrize(
    ("name", "options", "blocks", "width"),
    [
        ("resnet_small", {}, 15, 64),
        ("revnet38", {}, 9, 112),
        ("revvit_s", {"dim": 16, "depth": 2, "heads": 2, "image_size": 8, "patch_size": 4}, 2, 32),
        ("resnet50", {}, 16, 2048),
    ],
)
def test_every_classifier_has_blocks_and_the_last_is_what_the_head_sees(name, options, blocks, width):
    net, size = zoo.create(name, num_classes=3, **options).eval(), 32 if name == "resnet50" else 8
    x = torch.rand(2, 3, size, size)
    with torch.no_grad():
        found, logits = averages_by_depth(net, x)
        assert torch.equal(logits, net(x))
        if name == "resnet50":
            assert torch.allclose(net.fc(found[-1]), logits, atol=1e-5)
        else:
            assert torch.allclose(net.features(x).mean((2, 3)), found[-1], atol=1e-5)
    assert (len(found), found[-1].shape) == (blocks, (2, width))


def test_a_value_beyond_the_grid_is_computed_without_it():
    net, x = network(), 1e9 * torch.rand(2, 3, 8, 8)
    net.grid = "exact"
    found, _ = averages_by_depth(net, x)
    net.grid = None
    assert all(map(torch.equal, found, averages_by_depth(net, x)[0]))


def test_the_files_hold_what_the_network_gives(setting):
    subject, data, training, validation = kept(setting)
    for source, features in ((data.training, training), (data.validation, validation)):
        found, logits = averages_by_depth(subject.net, torch.cat(list(subject.batches(source, range(len(source)), 99))))
        for i, each in enumerate(found):
            assert np.allclose(features.block(i), each.numpy(), rtol=1e-4, atol=1e-5)
            assert features.block(i).dtype == np.float32
        assert (features.labels == source.labels).all()
        assert (features.predictions == logits.argmax(1).numpy()).all()
    assert training.key != validation.key
    assert training.names == ("body.2", "body.3")
    assert np.array_equal(training.block(-1), training.block(1))


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*.npy"))}


@pytest.mark.parametrize("stops", [1, 3])
def test_a_pass_that_was_stopped_goes_on_to_the_same_bytes(setting, monkeypatch, stops):
    kept(setting)
    expected = contents(setting.root / "features")
    shutil.rmtree(setting.root / "features")
    calls = []
    real = depth_module.averages_by_depth

    def failing(net, x):
        calls.append(len(x))
        if len(calls) == stops + 2:  # the first is that of zeros
            raise KeyboardInterrupt
        return real(net, x)

    monkeypatch.setattr(depth_module, "averages_by_depth", failing)
    with pytest.raises(KeyboardInterrupt):
        kept(setting)
    assert contents(setting.root / "features") != expected
    begun = next((setting.root / "features").glob("*/progress.json"))
    assert json.loads(begun.read_text()) == {"done": 5 * stops, "of": 24}
    calls[:] = [0] * 99
    kept(setting)
    assert calls[99:] == [1, *[5] * (4 - stops), 4, 1, 5, 5, 2]
    assert contents(setting.root / "features") == expected
    calls[:] = [0] * 99
    kept(setting)
    assert calls[99:] == [1, 1]  # nothing is computed twice


@pytest.mark.parametrize("length", [200, 0])
def test_a_damaged_file_is_made_anew(setting, length):
    _, _, training, _ = kept(setting)
    expected = contents(setting.root / "features")
    path = training.folder / "block_001.npy"
    path.write_bytes(path.read_bytes()[:length])
    kept(setting)
    assert contents(setting.root / "features") == expected


def test_features_of_other_inputs_are_never_taken(setting):
    keys = [kept(setting)[3].key]
    keys.append(kept(setting, size=16)[3].key)
    other = setting.data / "val" / "a" / "0.png"
    Image.fromarray(np.zeros((8, 8, 3), dtype=np.uint8)).save(other)  # the same name
    keys.append(kept(setting)[3].key)
    other.rename(other.with_name("9.png"))
    keys.append(kept(setting)[3].key)
    net = network()
    net.head[-1].bias.data[0] += 1e-6
    save_pretrained(net, setting.net)
    keys.append(kept(setting)[3].key)
    subject, data = open_subject(setting.net, size=8), open_data(setting.data)
    data.validation.labels[0] = 2
    keys.append(features_by_depth(subject, data.validation, range(12), setting.root / "features", batch=5).key)
    assert len(set(keys)) == 6


def test_a_disk_without_room_and_a_second_process_are_refused(setting, monkeypatch):
    subject, data = open_subject(setting.net, size=8), open_data(setting.data)
    arguments = (subject, data.validation, range(12), setting.root / "features")
    features = features_by_depth(*arguments)
    with depth_module._locked(features.folder), pytest.raises(InputError, match="another process is writing to"):
        features_by_depth(*arguments)
    monkeypatch.setattr(depth_module.shutil, "disk_usage", lambda path: SimpleNamespace(free=100))
    features_by_depth(*arguments)  # it is there already
    with pytest.raises(
        InputError, match=r"the features take 0.00 GiB, and 0.00 GiB are free in .*; take fewer --images"
    ):
        features_by_depth(subject, data.training, range(3), setting.root / "features")


def test_a_folder_that_cannot_be_written_to_is_refused(setting):
    (setting.root / "features").write_bytes(b"")
    with pytest.raises(InputError, match=r"cannot write to .*features/\w+: Not a directory"):
        kept(setting)


def test_images_that_cannot_be_read_and_values_that_are_not_finite_are_refused(setting):
    (setting.data / "val" / "b" / "1.png").write_bytes(b"no image")
    with pytest.raises(InputError, match=r"cannot read the image .*b/1.png: not an image file"):
        kept(setting)
    net = network()
    net.body[2].function[-1].weight.data.fill_(3e38)  # finite; the features are not
    save_pretrained(net, setting.net)
    with pytest.raises(InputError, match=r"the features of irevnet_small after body.2 are not finite"):
        kept(setting)


def test_scores_are_those_of_scikit_learn(setting):
    _, _, training, validation = kept(setting)
    found = separation_by_depth(training, validation, seed=3)
    assert found.network == pytest.approx(100 * (validation.predictions == validation.labels).mean())
    for i, each in enumerate(found.blocks):
        scaler = StandardScaler().fit(training.block(i))
        x, z = (scaler.transform(features.block(i)) for features in (training, validation))
        cost = best_cost(x, training.labels, seed=3)
        svm = LinearSVC(C=cost, dual="auto", random_state=3).fit(x, training.labels)
        near = KNeighborsClassifier(1).fit(x, training.labels)
        assert each.cost == cost
        assert each.svm == pytest.approx(100 * svm.score(z, validation.labels))
        assert each.neighbour == pytest.approx(100 * near.score(z, validation.labels))


def test_components_are_those_of_scikit_learn(setting):
    _, _, training, validation = kept(setting)
    found = accuracy_by_components(training, validation, components=[2, 24, 5], seed=3)
    assert (found.components, found.width) == ((2, 5, 24), 192)
    x, z = standardized(training.block(-1), validation.block(-1))
    pca = PCA(svd_solver="full").fit(x.astype(np.float64))
    for d, each, share in zip(found.components, found.scores, found.variance, strict=True):
        a, b = (pca.transform(values)[:, :d] for values in (x, z))
        near = KNeighborsClassifier(1).fit(a, training.labels)
        svm = LinearSVC(C=each.cost, dual="auto", random_state=3).fit(a, training.labels)
        assert each.neighbour == pytest.approx(100 * near.score(b, validation.labels))
        assert each.svm == pytest.approx(100 * svm.score(b, validation.labels))
        assert share == pytest.approx(pca.explained_variance_ratio_[:d].sum(), rel=1e-4)
    assert found.carrying(0.0) == 2
    assert accuracy_by_components(training, validation).components == (1, 2, 4, 8, 16, 24)


def test_cross_validation_prefers_what_tells_unseen_images_apart():
    generator = np.random.default_rng(0)
    labels = np.arange(3000) % 2
    x = generator.normal(size=(3000, 30))
    x[:, 0] += 1.5 * labels
    wide = np.concatenate([x, 1e-4 * x[:, :1]], axis=1)
    assert best_cost(wide, labels) < 10
    assert best_cost(2.0 * labels[:, None] - 1, labels) == 1e-5  # all are perfect: the smallest
    assert best_cost(np.zeros((30, 1)), np.arange(30) % 3 // 2) == 1e-5  # all are equally bad
    part = spread_over_classes(np.repeat([0, 1, 2], [100, 5, 50]), 45)
    assert [int(((part >= low) & (part < high)).sum()) for low, high in ((0, 100), (100, 105), (105, 155))] == [
        20,
        5,
        20,
    ]


def test_a_solver_that_was_stopped_is_reported():
    generator = np.random.default_rng(0)
    x, labels = generator.normal(size=(30, 200)), np.arange(30) % 2
    import zoo.analysis.classifiers as module

    assert class_scores(x, labels, x, labels).converged
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_svm", lambda cost, seed: LinearSVC(C=1, dual=True, max_iter=1, random_state=0))
        found = class_scores(x, labels, x, labels)
    assert not found.converged
    assert Separation((found,), 50.0).unfinished == [1]


def test_distances_are_those_of_scipy():
    generator = np.random.default_rng(0)
    x, labels = generator.normal(size=(50, 7)), generator.integers(0, 4, 50)
    distances, same = pdist(x), squareform(labels[:, None] == labels[None], checks=False)
    found = class_distances(x, labels)
    assert found == pytest.approx((distances[same].mean(), distances[~same].mean()), rel=1e-6)
    from sklearn import config_context

    with config_context(working_memory=0.01):  # in several pieces
        assert class_distances(x, labels) == pytest.approx(found)


@pytest.mark.parametrize("count", [300, 20])
def test_the_effective_dimension_is_that_of_the_covariance(count):
    x = np.random.default_rng(0).normal(size=(count, 30)) * np.linspace(0, 3, 30)
    values = np.linalg.eigvalsh(np.cov(x.T))[::-1]
    ratio, components = effective_dimension(x)
    assert ratio == pytest.approx(values.sum() ** 2 / (values**2).sum(), rel=1e-6)
    assert components == np.argmax(np.cumsum(values) >= 0.9 * values.sum()) + 1
    assert effective_dimension(7 * x)[0] == pytest.approx(ratio)
    assert effective_dimension(np.ones((4, 2))) == (0.0, 0)


def test_the_contraction_is_measured_on_standardised_features(setting):
    _, _, training, validation = kept(setting)
    found = contraction_by_depth(training, validation)
    for i, each in enumerate(found):
        scaler = StandardScaler().fit(training.block(i))
        x, z = (scaler.transform(features.block(i)) for features in (training, validation))
        assert (each.within, each.between) == pytest.approx(class_distances(z, validation.labels), rel=1e-5)
        assert (each.dimension, each.components) == pytest.approx(effective_dimension(x.astype(np.float64)), rel=1e-4)
        assert each.ratio == pytest.approx(each.within / each.between)
    assert Contraction(0.0, 0.0, 0.0, 0, 3).ratio is None


def test_results_are_kept_and_go_on(setting, monkeypatch):
    import zoo.analysis.separation as module

    _, _, training, validation = kept(setting)
    real, calls = module.class_scores, []

    def failing(*arguments, **options):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*arguments, **options)

    monkeypatch.setattr(module, "class_scores", failing)
    folder = setting.root / "results"
    with pytest.raises(KeyboardInterrupt):
        separation_by_depth(training, validation, folder=folder)
    found = separation_by_depth(training, validation, folder=folder)
    assert len(calls) == 3  # the first block once, the second twice
    assert found == separation_by_depth(training, validation, folder=folder)
    assert len(calls) == 3
    separation_by_depth(training, validation, folder=folder, seed=1)
    assert len(calls) == 5


def fake(counts, held=2):
    labels = np.repeat(np.arange(len(counts)), counts)
    validation = SimpleNamespace(labels=np.repeat(np.arange(len(counts)), held))
    return SimpleNamespace(
        classes=[str(i) for i in range(len(counts))], training=SimpleNamespace(labels=labels), validation=validation
    )


def test_classes_and_images_are_drawn_by_the_seed():
    data = fake([4] * 150)
    found = choose(data, seed=1)
    assert len(set(found.classes)) == 100
    assert found == choose(data, seed=1)
    assert found.classes != choose(data, seed=2).classes
    assert set(data.training.labels[list(found.training)]) == set(found.classes)
    assert len(found.validation) == 200
    few = choose(fake([10, 2, 10]), images=12)
    assert np.bincount(fake([10, 2, 10]).training.labels[list(few.training)]).tolist() == [5, 2, 5]
    assert choose(fake([3, 3])).classes == (0, 1)


@pytest.mark.parametrize("count", [1, 0, 4])
def test_a_number_of_classes_that_there_is_not_is_refused(count):
    with pytest.raises(
        InputError, match=rf"the number of classes must be in 2 ... 3, as the data has them, got {count}"
    ):
        choose(fake([3, 3, 3]), classes=count)
    with pytest.raises(InputError, match="to tell classes apart there must be at least 2, the data has 1"):
        choose(fake([3]))


def test_pictures_have_a_panel_or_a_line_for_each_network():
    scores = tuple(Scores(50.0 + i, 40.0 + i, 1.0, True) for i in range(3))
    axes = draw_separation([Separation(scores, 60.0)] * 2, ["one", "other"]).axes
    assert [each.get_title() for each in axes] == ["(a) one", "(b) other"]
    assert all(each.get_xlabel() and each.get_ylabel() for each in axes)
    axes = draw_contraction([(Contraction(1.0, 2.0, 3.0, 4, 5),)] * 2, ["one", "other"]).axes
    assert [len(each.lines) for each in axes] == [4, 2, 4]


def test_the_commands_write_numbers_and_pictures(setting, capsys, monkeypatch):
    monkeypatch.chdir(setting.root)
    save_pretrained(network(blocks=(1,)), "other")
    options = ["--checkpoint", "net", "--data", "data", "--output", "out", "--size", "8", "--workers", "0"]
    for name, more, said in (
        ("separation", [], "nearest neighbour"),
        ("dimensionality", ["--components", "2", "4"], "of the variance"),
        ("contraction", [], "between"),
    ):
        assert main([name, *options, "--beside", "other", *more]) == 0, capsys.readouterr().err
        assert said in capsys.readouterr().out
        found = json.loads((setting.root / "out" / f"{name}.json").read_text())
        assert [each["model"] for each in found["networks"]] == ["irevnet_small", "irevnet_small"]
        assert [len(each["names"]) for each in found["networks"]] == [2, 1]
        assert [each["checkpoint"] for each in found["networks"]] == ["net", "other"]
        assert (found["classes"], found["training_images"], found["validation_images"]) == (["a", "b", "c"], 24, 12)
        assert (setting.root / "out" / f"{name}.png").stat().st_size > 1000
    assert len(list((setting.root / "out" / "features").glob("*/progress.json"))) == 4


def test_what_does_not_fit_is_refused_in_one_line(setting, capsys, monkeypatch):
    monkeypatch.chdir(setting.root)
    save_pretrained(network("resnet_small", 4), "four")
    save_pretrained(network(classes=0), "headless")
    save_pretrained(zoo.create("iunet", num_classes=3), "iunet")
    save_pretrained(zoo.create("revvit_s", num_classes=3, dim=4, depth=1, heads=1, image_size=16), "vit")
    options = ["--checkpoint", "net", "--data", "data", "--output", "out", "--size", "8", "--workers", "0"]
    folds = "cross-validation needs at least 3 training images of each class, got 2 of class"
    for name, wrong, message in (
        ("separation", ["--classes", "4"], "the number of classes must be in 2 ... 3, as the data has them, got 4"),
        ("separation", ["--classes", "1"], "the number of classes must be in 2 ... 3, as the data has them, got 1"),
        ("contraction", ["--images", "25"], "these 3 classes have 24 training images, got --images 25"),
        ("separation", ["--images", "8"], folds),
        ("dimensionality", ["--images", "8"], folds),
        ("dimensionality", ["--components", "25"], "192 features of 24 training images have 1 ... 24 principal"),
        ("separation", ["--beside", "four"], "resnet_small in four tells 4 classes apart, and the data has 3"),
        (
            "contraction",
            ["--beside", "headless"],
            "irevnet_small in headless has no classifier; this analysis needs one",
        ),
        ("separation", ["--beside", "iunet"], "IUNet has no blocks that lead to a class; this analysis is of classi"),
        ("separation", ["--beside", "vit"], "revvit_s needs a size that 16 divides, got 8"),
        ("separation", ["--beside", "vit", "--size", "32"], "revvit_s does not take images of 32 pixels: RevViT: heig"),
        ("separation", ["--beside", "nothing"], "no such checkpoint: nothing"),
    ):
        assert main([name, *options, *wrong]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"error: {message}"), error
        assert error.count("\n") == 1
    assert not (setting.root / "out").exists()
