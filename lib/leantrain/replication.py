"""What it costs to replicate the papers in full: the arithmetic of every chapter's `paper` profile.

`PLANS` says for each chapter which networks its `paper` profile trains, on how many samples. The
multiply-accumulates and the memory of a sample are measured on the networks themselves and kept in
`book/networks.json`; `python -m leantrain.replication` measures them again. From both, `replication_costs` computes
operations, hours, energy and memory under stated `Assumptions`.

Counted are forward and backward passes of training. Left out are validation (a few per cent at most), the emulation of
accelerators, timings, and the small ablations on the digits.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from leantrain import paths
from leantrain.records import profile_parameters

if TYPE_CHECKING:
    from torch import Tensor, nn

    from leantrain.catalog import Catalog

__all__ = [
    "NETWORKS",
    "PLANS",
    "Assumptions",
    "Cost",
    "Measured",
    "Network",
    "Training",
    "cost_of",
    "measure",
    "measured_networks",
    "replication_costs",
    "write_measurements",
]

IMAGENET, CIFAR10, UCF101 = 1_281_167, 50_000, 9_537  # training samples; UCF-101: of its first split
_SST2, _COLA, _RTE = 67_349, 8_551, 2_490
_GLUE = {"sst2": _SST2, "cola": _COLA, "rte": _RTE, "mrpc": 3_668, "qqp": 363_846, "qnli": 104_743, "mnli": 392_702,
         "stsb": 5_749}  # fmt: skip
_WIKITEXT2_TOKENS = 2_400_000  # of the chapters' own tokenizers, about


@dataclass(frozen=True, slots=True)
class Assumptions:
    """What turns operations into hours and energy.

    Attributes:
        peak: Operations a second of the accelerator in the profile's precision; two make a multiply-accumulate.
        convolutional: Share of the peak that training convolutional networks reaches, above 0 to 1.
        transformer: The same for transformers.
        watts: Power that the accelerator draws in training.
        overhead: What the machine around it and cooling draw, as a factor of at least 1.
    """

    peak: float = 989e12
    convolutional: float = 0.1
    transformer: float = 0.3
    watts: float = 700.0
    overhead: float = 1.3

    def __post_init__(self) -> None:
        shares = (self.convolutional, self.transformer)
        if not (self.peak > 0 and self.watts >= 0 and self.overhead >= 1 and all(0 < share <= 1 for share in shares)):
            raise ValueError(f"expected a positive peak, shares above 0 to 1 and an overhead of at least 1, got {self}")


@dataclass(frozen=True, slots=True)
class Network:
    """A network of the papers.

    Attributes:
        build: Builds it.
        pair: Two samples, as a batch: normalisation needs more than one.
        kind: What it is for `Assumptions`.
        device: Where it is measured: on `meta` nothing is computed, but some models ask for values.
    """

    build: Callable[[], nn.Module]
    pair: Callable[[], Tensor]
    kind: Literal["convolutional", "transformer"]
    device: Literal["meta", "cpu"] = "meta"


@dataclass(frozen=True, slots=True)
class Measured:
    """A network's cost for one sample.

    Attributes:
        macs: Multiply-accumulates of a forward pass.
        parameters: Number of parameters.
        activations: Bytes that autograd keeps for the backward pass in 32 bits.
    """

    macs: int
    parameters: int
    activations: int


@dataclass(frozen=True, slots=True)
class Training:
    """Trainings of one network.

    Attributes:
        network: Name in `NETWORKS`.
        samples: Training samples, over all epochs and runs.
        passes: Forward passes that the arithmetic of one sample amounts to; a backward pass counts two.
        batch: Samples that are in memory at a time, 0 if another training of the chapter needs more.
        states: Numbers that the optimiser keeps for each parameter.
    """

    network: str
    samples: float
    passes: float = 3.0
    batch: int = 0
    states: int = 2


@dataclass(frozen=True, slots=True)
class Cost:
    """What a chapter's `paper` profile costs.

    Attributes:
        networks: Names of the networks trained, largest share first.
        operations: Floating-point operations, two for a multiply-accumulate.
        hours: Hours of one accelerator.
        energy: Kilowatt-hours.
        memory: Bytes of weights, gradients, optimiser and activations of the largest training on one device.
    """

    networks: tuple[str, ...]
    operations: float
    hours: float
    energy: float
    memory: float


# ---------------------------------------------------------------- networks


def _image(side: int) -> Callable[[], Tensor]:
    def pair() -> Tensor:
        import torch

        return torch.empty(2, 3, side, side)

    return pair


def _tokens(length: int) -> Callable[[], Tensor]:
    def pair() -> Tensor:
        import torch

        return torch.zeros(2, length, dtype=torch.long)

    return pair


def _clip() -> Tensor:
    import torch

    return torch.empty(2, 16, 3, 243, 243)


def _vit_small() -> nn.Module:
    from leantrain.training import small_vit

    return small_vit(
        image_size=224, patch_size=16, in_chans=3, num_classes=1000, dim=384, depth=12, heads=6, mlp_ratio=4.0
    )


def _vit_small_32() -> nn.Module:
    from leantrain.training import small_vit

    return small_vit(image_size=32, patch_size=4, num_classes=10, dim=384, depth=12, heads=6)


def _torchvision(name: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import torchvision.models

        heads = {"aux_logits": False, "init_weights": False} if name == "googlenet" else {}
        return torchvision.models.get_model(name, weights=None, **heads)

    return build


def _mobilenet() -> nn.Module:
    from timm import create_model

    return create_model("mobilenetv1_100")


def _eco() -> nn.Module:
    from leantrain.techniques.conv3d_4d import ClipNet, EcoLite

    return ClipNet(EcoLite("conv3d", num_classes=101))


def _resnet9() -> nn.Module:
    from leantrain.techniques.hardware_aware_resnet9 import Recipe

    return Recipe().network(64, in_chans=3, num_classes=10)


def _hebbian() -> nn.Module:
    from leantrain.techniques.fasthebb import IMAGENET as STAGES
    from leantrain.techniques.fasthebb import HebbianNet, set_hebbian

    net = HebbianNet(STAGES, in_shape=(3, 224, 224), num_classes=1000, rule="hpca", hidden=4096)
    return set_hebbian(net, False)


def _diverse_branches() -> nn.Module:
    from leantrain.techniques.orepa import convert

    return convert(_torchvision("resnet18")(), "dbb")


def _cifar_resnet18() -> nn.Module:
    from leantrain.techniques.fgsm_sdi import cifar_resnet18

    return cifar_resnet18()


def _vgg_s() -> nn.Module:
    from leantrain.hardware.procrustes import vgg_s

    return vgg_s(1.0, in_channels=3, num_classes=10)


def _gpt2(depth: int) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        from leantrain.techniques.compressed_gpt2 import gpt2

        return gpt2(vocab_size=50257, context=1024, width=768, depth=depth, heads=12)

    return build


def _detector() -> nn.Module:
    import torch
    from torch import nn

    from leantrain.techniques.few_shot_ptf import standard_detector

    class FixedRegions(nn.Module):
        """All parts of a detector that have weights, on 512 regions an image, as in training."""

        def __init__(self) -> None:
            super().__init__()
            self.model = standard_detector(20)

        def forward(self, x: Tensor) -> Tensor:
            heads, maps = self.model.roi_heads, list(self.model.backbone(x).values())
            proposals = self.model.rpn.head(maps)
            boxes = heads.box_predictor(heads.box_head(x.new_zeros(512 * len(x), 256, 7, 7)))
            return torch.cat([out.flatten() for outs in (*proposals, boxes) for out in outs])

    return FixedRegions()


def _photographs() -> Tensor:
    import torch

    return torch.empty(2, 3, 800, 1088)  # pictures of 4 to 3, padded to multiples of 32


def _bert() -> nn.Module:
    from leantrain.techniques.progressive_layer_dropping import pre_ln_bert

    return pre_ln_bert(30522, max_length=128, dim=768, depth=12, heads=12)


def _masked_vit(size: int) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        from leantrain.techniques.fastmim import full_size

        return full_size("fastmim", "vit-b", size)

    return build


def _vit_base() -> nn.Module:
    from leantrain.techniques.fastmim import full_size, transfer

    return transfer(full_size("fastmim", "vit-b", 224).encoder, num_classes=1000, image_size=224)


NETWORKS: dict[str, Network] = {
    "ViT-S/16": Network(_vit_small, _image(224), "transformer"),
    "ViT-B/16": Network(_vit_base, _image(224), "transformer"),
    "FastMIM of ViT-B/16, 128 px": Network(_masked_vit(128), _image(128), "transformer"),
    "FastMIM of ViT-B/16, 224 px": Network(_masked_vit(224), _image(224), "transformer"),
    "ViT-S/4, 32 px": Network(_vit_small_32, _image(32), "transformer"),
    "BERT-base, 128 tokens": Network(_bert, _tokens(128), "transformer"),
    "GPT-2, 1,024 tokens": Network(_gpt2(12), _tokens(1024), "transformer", "cpu"),
    "GPT-2 of 6 blocks, 1,024 tokens": Network(_gpt2(6), _tokens(1024), "transformer", "cpu"),
    "ECO-Lite, 16 frames": Network(_eco, _clip, "convolutional"),
    "ResNet-9, 32 px": Network(_resnet9, _image(32), "convolutional"),
    "ResNet-18, 32 px": Network(_cifar_resnet18, _image(32), "convolutional"),
    "VGG-S, 32 px": Network(_vgg_s, _image(32), "convolutional"),
    "Hebbian network of ten layers": Network(_hebbian, _image(224), "convolutional"),
    "ResNet-18 of diverse branches": Network(_diverse_branches, _image(224), "convolutional"),
    "MobileNet v1": Network(_mobilenet, _image(224), "convolutional"),
    "Faster R-CNN, ResNet-101": Network(_detector, _photographs, "convolutional"),
    **{
        title: Network(_torchvision(name), _image(224), "convolutional")
        for title, name in {
            "ResNet-18": "resnet18",
            "ResNet-50": "resnet50",
            "AlexNet": "alexnet",
            "VGG-16": "vgg16",
            "GoogLeNet": "googlenet",
            "DenseNet-121": "densenet121",
            "SqueezeNet 1.0": "squeezenet1_0",
            "SqueezeNet 1.1": "squeezenet1_1",
        }.items()
    },
}

_TITLES = {"resnet18": "ResNet-18", "resnet50": "ResNet-50", "alexnet": "AlexNet", "vgg16": "VGG-16",
           "googlenet": "GoogLeNet", "densenet121": "DenseNet-121", "squeezenet1_0": "SqueezeNet 1.0",
           "squeezenet1_1": "SqueezeNet 1.1", "mobilenetv1": "MobileNet v1", "four-bit-resnet18": "ResNet-18",
           "pruned-resnet50": "ResNet-50"}  # fmt: skip


def measure(name: str) -> Measured:
    """Measure what a network costs for one sample: half of what two cost together.

    Args:
        name: One of `NETWORKS`.

    Raises:
        KeyError: If there is no such network.
    """
    import torch

    from leantrain.measure import count_macs, count_parameters
    from leantrain.measure.memory import saved_activation_bytes

    def forward() -> Tensor:
        out = model(x)
        return out.logits if hasattr(out, "logits") else out

    network = NETWORKS[name]
    with torch.device(network.device):
        model, x = network.build().train(), network.pair()
        return Measured(count_macs(model, x) // 2, count_parameters(model), saved_activation_bytes(forward) // 2)


def measured_networks() -> dict[str, Measured]:
    """The stored measurements of all networks.

    Raises:
        FileNotFoundError: If the book's file of measurements is missing.
    """
    stored = json.loads(paths.NETWORK_COSTS.read_text(encoding="utf-8"))
    return {name: Measured(**row) for name, row in stored.items()}


def write_measurements() -> None:
    """Measure all networks and write the book's file of measurements."""
    rows = {name: asdict(measure(name)) for name in NETWORKS}
    paths.write_atomically(paths.NETWORK_COSTS, json.dumps(rows, indent=1) + "\n")


# ---------------------------------------------------------------- what the chapters train

Plan = Callable[[Mapping[str, Any]], Iterator[Training]]


def _adan(p: Mapping[str, Any]) -> Iterator[Training]:
    seeds, epochs, full = len(p["seeds"]), p["epochs"], "ViT-S/16"
    lengths = epochs // 2 + epochs
    tuned = sum(len(p[rates]) * lengths for rates in ("adamw_rates", "adan_rates") if len(p[rates]) > 1)
    compared = 2 * lengths * seeds
    batches = 2 * (len(p["sweep_batches"]) - 1) * epochs * seeds
    yield Training(full, (tuned + compared + batches) * IMAGENET, batch=max(p["sweep_batches"]), states=4)


def _vit_variants(p: Mapping[str, Any]) -> Iterator[Training]:
    runs = len(p["variants"]) * len(p["seeds"])
    yield Training("ViT-S/16", runs * p["epochs"] * IMAGENET, batch=p["batch_size"])


def _clars(p: Mapping[str, Any]) -> Iterator[Training]:
    tries = 2 * len(p["sgd_rates"]) + 2 * len(p["lars_rates"]) + len(p["clars_rates"])
    epochs = tries * p["tuning_seeds"] * p["tuning_epochs"] + 5 * len(p["seeds"]) * p["epochs"]
    yield Training("ResNet-50", epochs * IMAGENET, batch=p["physical_batch"], states=1)


def _compressed_gpt2(p: Mapping[str, Any]) -> Iterator[Training]:
    large, small = "GPT-2, 1,024 tokens", "GPT-2 of 6 blocks, 1,024 tokens"
    blocks, epochs, seeds = p["epoch_steps"] * p["batch_size"], p["epochs"], len(p["seeds"])
    some = min(2, seeds)
    parents = p["parent_epochs"] + p["parent_epochs"] // 4
    tries = (len(p["plain_rates"]), len(p["distil_rates"])) if len(p["plain_rates"]) > 1 else (0, 0)
    distilled = tries[1] * (epochs // 2) + (seeds + 2 * some) * epochs
    # Truncated, for longer (1.7 times as long) and from random weights; two ablations and the younger parent's.
    plain = tries[0] * (epochs // 2) + (seeds * (1 + 1.7 + 1) + 3 * some) * epochs + 3 * seeds * p["cleaning_epochs"]
    reviews = _SST2 * p["task_epochs"] / 32  # of about 32 tokens
    yield Training(large, parents * blocks + reviews, batch=p["batch_size"])
    yield Training(small, (plain + distilled) * blocks + 7 * seeds * reviews)
    yield Training(large, distilled * blocks + 3 * seeds * reviews, passes=1)  # the teacher only looks


def _conv3d(p: Mapping[str, Any]) -> Iterator[Training]:
    trials = 2 * len(p["learning_rates"]) * p["tuning_epochs"] if len(p["learning_rates"]) > 1 else 0
    epochs = trials + len(p["kinds"]) * len(p["seeds"]) * p["epochs"]
    yield Training("ECO-Lite, 16 frames", epochs * UCF101, batch=p["batch_size"])


def _traced(p: Mapping[str, Any]) -> Iterator[Training]:
    for name in p["networks"]:
        yield Training(_TITLES[name], len(p["seeds"]) * p["epochs"] * IMAGENET, batch=p["batch_size"])


def _fpraker(p: Mapping[str, Any]) -> Iterator[Training]:
    yield from _traced(p)
    yield Training("ResNet-18, 32 px", 3 * len(p["seeds"]) * p["emulated_epochs"] * CIFAR10)


def _low_rank(kinds: Callable[[Mapping[str, Any]], int]) -> Plan:
    def plan(p: Mapping[str, Any]) -> Iterator[Training]:
        trials = len(p["tuned_rates"]) if len(p["tuned_rates"]) > 1 else 0
        dense = (len(p["seeds"]) + (trials > 0)) * p["dense_epochs"]
        tuned = kinds(p) * (len(p["seeds"]) + trials) * p["tuned_epochs"]
        yield Training("ResNet-50", (dense + tuned) * IMAGENET, batch=p["batch_size"], states=1)

    return plan


def _pruning(p: Mapping[str, Any]) -> Iterator[Training]:
    arms = 1 + len(p["sparsities"]) + 2 * p["ablation"]
    trials = 2 * len(p["tuned_rates"]) if len(p["tuned_rates"]) > 1 else 0
    dense = (len(p["seeds"]) + (trials > 0)) * p["dense_epochs"]
    tuned = (arms * len(p["seeds"]) + trials) * p["tuned_epochs"]
    yield Training("ResNet-50", (dense + tuned) * IMAGENET, batch=p["batch_size"], states=1)


def _resnet9_recipe(p: Mapping[str, Any]) -> Iterator[Training]:
    full, seeds, ladder = "ResNet-9, 32 px", len(p["seeds"]), len(p["ladder_seeds"])
    tried = 2 * len(p["rates"]) * p["tuning_epochs"] if len(p["rates"]) > 1 else 0
    single = tried + (3 * seeds + 3 * ladder) * p["ablation_epochs"]
    double = (seeds + 0.5 * ladder) * p["ablation_epochs"]  # sharpness-aware: two gradients a step
    yield Training(full, single * p["train_size"], batch=p["batch_size"], states=1)
    yield Training(full, double * p["train_size"], passes=6)
    # Ten minutes are ten minutes on any machine, but no more than so many epochs; with both extra steps on.
    yield Training(full, len(p["timed_seeds"]) * p["epochs"] * p["train_size"], passes=9)


def _plrd(p: Mapping[str, Any]) -> Iterator[Training]:
    seeds, members = len(p["seeds"]), len(p["compressions"])
    stage = p["stage_steps"] * p["batch_size"]
    full_runs = seeds + 1 + seeds * members + 2 * len(p["parent_rates"]) / 3
    # A round of short runs: the family, from the parent at once (two lengths), from random weights (1 to so many).
    round_of = members + members + 1 + members * (members + 1) / 2
    rounds = seeds + len(p["stage_rates"]) + p["longer"] * (seeds + len(p["stage_rates"]))
    yield Training(
        "GPT-2, 1,024 tokens", (full_runs * p["parent_stages"] + rounds * round_of) * stage, batch=p["batch_size"]
    )


def _procrustes(p: Mapping[str, Any]) -> Iterator[Training]:
    arms = 1 + 2 * len(p["budgets"]) + len(p["others"])
    epochs = (2 * len(p["learning_rates"]) + arms * len(p["seeds"])) * p["epochs"]
    yield Training("VGG-S, 32 px", epochs * CIFAR10, batch=p["batch_size"], states=0)


def _pld(p: Mapping[str, Any]) -> Iterator[Training]:
    seeds, arms = len(p["seeds"]), len(p["arms"]) + len(p["limits"])
    blocks = _WIKITEXT2_TOKENS // p["block"]
    tasks = 5 * (_SST2 + _COLA + _RTE) * (arms + 2 * p["snapshots"]) * seeds
    yield Training("BERT-base, 128 tokens", arms * seeds * p["epochs"] * blocks + tasks, batch=p["batch_size"])


def _swiftlearn(p: Mapping[str, Any]) -> Iterator[Training]:
    samples = sum(_GLUE[task] for task in p["tasks"])
    runs = 4 * len(p["seeds"]) + len(p["task_rates"])
    yield Training("BERT-base, 128 tokens", runs * p["task_epochs"] * samples, batch=p["task_batch"])


def _fasthebb(p: Mapping[str, Any]) -> Iterator[Training]:
    full, seeds = "Hebbian network of ten layers", len(p["seeds"])
    trials = len(p["label_rates"]) if len(p["label_rates"]) > 1 else 0
    hebbian = (p["hpca_epochs"] + p["swta_epochs"]) * (seeds + (trials > 0)) * IMAGENET
    yield Training(full, hebbian, passes=2, batch=p["batch_size"], states=0)  # a forward pass, and as much again
    labelled = 4 * p["label_epochs"] * (sum(p["labels"]) * seeds + p["labels"][0] * trials)
    yield Training(full, p["gradient_epochs"] * seeds * IMAGENET + labelled, batch=p["label_batch"], states=1)


def _orepa(p: Mapping[str, Any]) -> Iterator[Training]:
    trials = len(p["learning_rates"]) * p["tuning_epochs"] if len(p["learning_rates"]) > 1 else 0
    each = (trials + len(p["seeds"]) * p["epochs"]) * IMAGENET
    branched = sum(kind in ("dbb", "normed-branches") for kind in p["kinds"])
    yield Training("ResNet-18", (len(p["kinds"]) - branched) * each, batch=p["batch_size"], states=1)
    if branched:
        yield Training("ResNet-18 of diverse branches", branched * each, batch=p["batch_size"], states=1)


def _fastmim(p: Mapping[str, Any]) -> Iterator[Training]:
    seeds, batch = len(p["seeds"]), p["batch_size"]
    trial = len(p["tune_rates"]) > 1
    arms = 2 * len(p["resolutions"])
    # Growing in three stages, 128, 160 and 192 pixels: as many tokens on average as 162 pixels have, 1.6 times 128's.
    each = (seeds + trial) * p["pretrain_epochs"] * IMAGENET
    yield Training("FastMIM of ViT-B/16, 128 px", (2 + 1.6 * p["growing"]) * each, batch=batch)
    yield Training("FastMIM of ViT-B/16, 224 px", 2 * each, batch=batch)
    tried = (1 + arms) * len(p["tune_rates"]) * (p["tune_epochs"] // 2) if trial else 0
    tuned = (1 + arms + p["growing"]) * seeds * p["tune_epochs"]
    yield Training("ViT-B/16", (tried + tuned) * IMAGENET, batch=batch)


def fgsm_passes(steps: int, every: int) -> dict[str, float]:
    """Passes of a training step of each method: `fgsm_sdi.step_cost`, without loading PyTorch for it."""
    generator = 80.8 / 555.4  # multiply-accumulates of the paper's generator over those of its classifier
    return {"zero": 5, "random": 5, "learned": 7 + generator + (4 + 3 * generator) / every, "many": 3 + 2 * steps}


def _fgsm(p: Mapping[str, Any]) -> Iterator[Training]:
    full, seeds, attacks = "ResNet-18, 32 px", len(p["seeds"]), 0.0
    for start, passes in fgsm_passes(p["attack_steps"], p["every"]).items():
        epochs = p["many_epochs"] if start == "many" else p["epochs"]
        attacks += seeds * epochs / p["attack_every"] * 10_000  # validation images, under one step and many
        yield Training(full, seeds * epochs * CIFAR10, passes=passes, batch=p["batch_size"], states=1)
    yield Training(full, attacks, passes=2 * (1 + p["attack_steps"]) + 3)


def _few_shot(p: Mapping[str, Any]) -> Iterator[Training]:
    # The base detector; fine-tuning the last layer on stored features costs next to nothing.
    for scenes, epochs in zip(p["epoch_scenes"], p["epochs"], strict=True):
        samples = len(p["seeds"]) * epochs * scenes
        yield Training("Faster R-CNN, ResNet-101", samples, batch=p["batch_size"], states=1)


def _stacking(p: Mapping[str, Any]) -> Iterator[Training]:
    full, assumed = "ViT-S/4, 32 px", Assumptions()
    tried = len(p["adamw_rates"]) + len(p["adan_rates"]) if len(p["adamw_rates"]) > 1 else 0
    arms = 6 + 4 * p["leave_out"]
    seconds = tried * p["tuning_seconds"] + arms * len(p["seeds"]) * p["seconds"]
    # Hours are what is given; the samples are those that plain training gets through in them.
    samples = seconds * assumed.peak * assumed.transformer / (2 * 3 * measured_networks()[full].macs)
    yield Training(full, samples, batch=p["batch_size"], states=4)


#: What each chapter's `paper` profile trains.
PLANS: dict[str, Plan] = {
    "adan": _adan,
    "skipvit": _vit_variants,
    "gqkva": _vit_variants,
    "clars": _clars,
    "compressed-gpt2": _compressed_gpt2,
    "conv3d-4d": _conv3d,
    "fpraker": _fpraker,
    "tensordash": _traced,
    "gradient-sparsity": _traced,
    "procrustes": _procrustes,
    "hardware-aware-lrd": _low_rank(lambda p: 3),
    "lrd-rank-freeze": _low_rank(lambda p: 1 + len(p["schedules"])),
    "lrd-study": _low_rank(lambda p: 1 + len(p["forms"])),
    "hardware-aware-resnet9": _resnet9_recipe,
    "plrd": _plrd,
    "progressive-layer-dropping": _pld,
    "swiftlearn": _swiftlearn,
    "fgsm-sdi": _fgsm,
    "pruning-bitwidth": _pruning,
    "fasthebb": _fasthebb,
    "orepa": _orepa,
    "fastmim": _fastmim,
    "few-shot-ptf": _few_shot,
    "stacking": _stacking,
}


# ---------------------------------------------------------------- costs


def _five_seeds(parameters: Mapping[str, Any]) -> dict[str, Any]:
    lists = {name: list(range(5)) for name in parameters if name == "seeds" or name.endswith("_seeds")}
    return {**parameters, **{name: five for name, five in lists.items() if isinstance(parameters[name], list)}}


def cost_of(
    trainings: list[Training],
    networks: Mapping[str, Measured],
    assumptions: Assumptions | None = None,
    bytes_a_number: int = 4,
) -> Cost:
    """Add up trainings.

    Args:
        trainings: At least one.
        networks: What a sample costs, by name.
        assumptions: By default those of the book.
        bytes_a_number: Of an activation: 2 in bfloat16, 4 in 32 bits. Weights, gradients and optimiser count 4.

    Raises:
        ValueError: If there are no trainings.
    """
    if not trainings:
        raise ValueError("a chapter without trainings has no cost: give at least one")
    assumed = assumptions or Assumptions()
    reached = {"convolutional": assumed.convolutional, "transformer": assumed.transformer}
    operations: dict[str, float] = {}
    hours = memory = 0.0
    for t in trainings:
        one = networks[t.network]
        count = 2.0 * one.macs * t.passes * t.samples
        operations[t.network] = operations.get(t.network, 0.0) + count
        hours += count / (assumed.peak * reached[NETWORKS[t.network].kind]) / 3600
        if t.batch:
            fixed = 4.0 * (2 + t.states) * one.parameters
            memory = max(memory, fixed + one.activations * t.batch * bytes_a_number / 4)
    energy = hours * assumed.watts * assumed.overhead / 1000
    largest = sorted(operations, key=lambda name: -operations[name])
    return Cost(tuple(largest), sum(operations.values()), hours, energy, memory)


def replication_costs(catalog: Catalog, assumptions: Assumptions | None = None) -> dict[str, tuple[Cost, Cost]]:
    """For every built chapter that has a plan, the cost of its `paper` profile as it stands, and with five seeds.

    Args:
        catalog: Names the chapters.
        assumptions: By default those of the book.
    """
    networks, found = measured_networks(), {}
    for paper in catalog.built():
        if paper.slug not in PLANS:
            continue
        parameters = profile_parameters(paper, "paper")
        size = 2 if "bf16" in str(parameters.get("precision", "")) else 4
        both = (parameters, _five_seeds(parameters))
        as_it_is, five = (cost_of(list(PLANS[paper.slug](p)), networks, assumptions, size) for p in both)
        found[paper.slug] = (as_it_is, five)
    return found


if __name__ == "__main__":
    write_measurements()
