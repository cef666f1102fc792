"""Every technique that trains: a run that goes on from a checkpoint ends as the run that was never interrupted.

What a checkpoint of Lightning does not hold is named case by case. With it handed over, every run goes on to the last
bit; without, it does not, and a strict xfail says so. Optimisers (Adan, CLARS, DropBack), layer dropping, SwiftLearn
and pruning have such a test where the technique is tested.
"""

from __future__ import annotations

import copy
import logging
import random
from collections.abc import Callable
from functools import cache, partial
from operator import attrgetter
from types import SimpleNamespace
from typing import Any, NamedTuple

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Checkpoint
from torch import nn
from torch.optim import SGD, AdamW

from leantrain.data import DigitScenes, digit_scenes, images
from leantrain.data.seeded import SeededData, epoch_generator
from leantrain.data.sentence_sets import SentenceBatch
from leantrain.hardware.gradient_sparsity import PEArray, SparsityClassifier
from leantrain.hardware.trace import TraceCallback, TracedClassifier
from leantrain.low_rank.factors import choose_ranks, decompose_model
from leantrain.studies.stacking import StackedClassifier, active_images, stacked
from leantrain.techniques import compressed_gpt2 as gpt
from leantrain.techniques import fasthebb, fastmim
from leantrain.techniques import fgsm_sdi as sdi
from leantrain.techniques.clars import CLARS, LargeBatchClassifier
from leantrain.techniques.conv3d_4d import ClipNet, VideoNet
from leantrain.techniques.few_shot_ptf import BaseTraining, small_detector
from leantrain.techniques.gqkva import group_attention
from leantrain.techniques.hardware_aware_lrd import policy
from leantrain.techniques.hardware_aware_resnet9 import Recipe, SmallDataClassifier, TimeBudget
from leantrain.techniques.lrd_rank_freeze import FactorFreezing
from leantrain.techniques.lrd_study import merge_bottlenecks
from leantrain.techniques.orepa import convert
from leantrain.techniques.plrd import factor_tied_embedding, family_ranks, lower_ranks, plain_linears
from leantrain.techniques.progressive_layer_dropping import pre_ln_bert
from leantrain.techniques.skipvit import skip_tokens
from leantrain.training import (
    ImageClassifier,
    LanguageModel,
    MaskedLanguageModel,
    PretrainedClassifier,
    SequenceClassifier,
    Snapshots,
    small_resnet,
    small_vit,
)

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")

EPOCHS, SAVED, SEED, OTHER = 4, 2, 5, 99
ADAMW = partial(AdamW, lr=1e-2)
MOMENTUM = partial(SGD, lr=0.05, momentum=0.9)
V = 30

# ---------------------------------------------------------------- data: batches by seed and epoch, as the project's are


def digits(batch_size=8):
    """Cropped at random anew in every epoch."""
    return images("digits", batch_size=batch_size, train_size=32, val_size=16, augment=True)


def digits_in_twos():
    return fasthebb.Passes(digits(), 2)


def chosen_digits():
    return active_images("digits", batch_size=8, train_size=32, val_size=16)


def scenes():
    recipe = DigitScenes(side=64, sizes=(16, 28), novel=(8, 9))
    return digit_scenes(recipe, batch_size=2, train_size=4, val_size=2)


def texts(batch: Callable[[torch.Tensor], Any] = lambda ids: ids):
    """Random words in an order of the seed and the epoch."""
    ids = torch.randint(1, V, (24, 10), generator=torch.Generator().manual_seed(0))

    def train_batches(seed, epoch):
        order = torch.randperm(24, generator=epoch_generator(seed, epoch, "order"))
        return map(batch, ids[order].split(6))

    return SeededData(
        name="texts", checksums={}, batch_size=6, sizes=(24, 6), options={},
        train_batches=train_batches, val_batches=lambda: iter([batch(ids[:6])]),
    )  # fmt: skip


def sentences():
    """The same, of several lengths and two classes."""

    def labelled(ids):
        mask = (torch.arange(10) < 4 + ids[:, :1] % 6).long()
        return SentenceBatch(ids * mask, mask, (ids[:, 1] > V // 2).long(), torch.arange(len(ids)))

    return texts(labelled)


# ---------------------------------------------------------------- modules


def mlp():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Linear(24, 10))


def resnet():
    return small_resnet(in_chans=1, num_classes=10, widths=(4, 4), blocks=1)


def vit(depth=4):
    model = small_vit(image_size=8, patch_size=2, in_chans=1, num_classes=10, dim=24, depth=depth, heads=6, mlp_ratio=2)
    for parameter in model.parameters():  # timm's class token starts with a look at nothing in particular
        nn.init.normal_(parameter, std=0.3)
    return model


def bert(**options):
    sizes = {"max_length": 10, "dim": 16, "depth": 2, "heads": 2, "mlp_ratio": 2.0}
    return pre_ln_bert(V, **sizes, **{"dropout": 0.0, **options})


def small_gpt2(depth=2, **options):
    return gpt.gpt2(**{"vocab_size": V, "context": 10, "width": 24, "depth": depth, "heads": 3, **options})


def classified(net, optimizer=ADAMW, **options):
    return ImageClassifier(net, optimizer, num_classes=10, **options)


def decomposed(net):
    return decompose_model(net, choose_ranks(net, compression=2))


def fine_tuned(dropout):
    net = fasthebb.HebbianNet(
        (fasthebb.Stage(4, 3),), in_shape=(1, 8, 8), num_classes=10, rule="swta", hidden=6, dropout=dropout
    )
    return classified(fasthebb.set_hebbian(net, False))


def hebbian(rule):
    stages = (fasthebb.Stage(4, 3), fasthebb.Stage(5, 3))
    whitening = fasthebb.Whitening.fit(torch.rand(20, 1, 8, 8), kernel=3)
    net = fasthebb.HebbianNet(
        stages, in_shape=(1, 8, 8), num_classes=10, rule=rule, hidden=6, whitening=whitening, dropout=0.5
    )
    return fasthebb.HebbianPretraining(net, lr=0.1)


def small_data(recipe, budget=None):
    pixels = torch.rand(20, 1, 8, 8, generator=torch.Generator().manual_seed(0)) if recipe.whitening else None
    return SmallDataClassifier(recipe.network(4, in_chans=1), recipe, images=pixels, budget=budget)


def large_batch():
    optimizer = partial(CLARS, lr=1.0)
    sizes = {"accumulate": 2, "physical_batch": 5, "micro_batches": 2, "micro_size": 2}
    return LargeBatchClassifier(mlp(), optimizer, num_classes=10, **sizes, refresh=3, warmup_epochs=1)


def adversarial(start, **options):
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10))
    generator = sdi.StartGenerator(1, 4) if start == "learned" else None
    return sdi.AdversarialClassifier(
        sdi.PixelModel(net), MOMENTUM, start=start, epsilon=0.1, generator=generator, steps=2, every=3, **options
    )


def masked_images(*resolutions):
    encoder = fastmim.vit_encoder(image_size=8, patch_size=4, dim=16, depth=1, heads=2, in_chans=1)
    model = fastmim.FastMIM(encoder, cell=2, decoder_width=16, decoder_heads=2)
    return fastmim.Pretraining(model, ADAMW, resolutions=resolutions)


def from_encoder(drop_path=0.0, **options):
    encoder = fastmim.vit_encoder(image_size=8, patch_size=4, dim=16, depth=2, heads=2, in_chans=1)
    model = fastmim.transfer(encoder, num_classes=10, image_size=12, drop_path=drop_path)
    build = fastmim.layer_decayed(model, AdamW, lr=1e-2, weight_decay=0.05, decay=0.7)
    return fastmim.FineTuning(model, build, image_size=12, num_classes=10, label_smoothing=0.1, **options)


def distilled_text(**options):
    parent = small_gpt2(3, **options)
    return gpt.DistilledLanguageModel(gpt.truncate(parent, [0, 2]), parent, ADAMW)


def distilled_classes(hint):
    teacher = gpt.classifier_from(small_gpt2(3), 2)
    return gpt.DistilledClassifier(gpt.truncate(teacher, [0, 2]), teacher, ADAMW, num_classes=2, hint=hint)


def family_member():
    """The second member of a family, with a factored embedding."""
    model = plain_linears(small_gpt2())
    first, second = family_ranks(model, [1.5, 2.5], lambda name, layer: ".h." in name)
    factor_tied_embedding(lower_ranks(model, first), 12)
    return LanguageModel(lower_ranks(model, {**second, "lm_head": 8}), ADAMW)


def masked_text(**options):
    return MaskedLanguageModel(bert(**options), ADAMW, vocab_size=V, mask_id=0, seed=3)


def clips(kind):
    net = ClipNet(VideoNet(kind, in_channels=1, num_classes=10, widths=(4, 4), blocks=1))
    return classified(nn.Sequential(nn.Flatten(), nn.Unflatten(1, (2, 1, 4, 8)), net), MOMENTUM)


def stack(*techniques, **settings):
    return StackedClassifier(vit(), stacked(techniques, **settings), rate=1e-2, num_classes=10, micro_size=2, seed=3)


def traced():
    def report(trace):
        return {"zeros": trace.layers[-1].masks["input"].sparsity}

    return TracedClassifier(mlp(), ADAMW, num_classes=10, report=report, samples=3)


def sparse():
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10))
    return SparsityClassifier(net, ADAMW, num_classes=10, configs={"a": PEArray(units=8)}, samples=2)


# ---------------------------------------------------------------- what a checkpoint does not hold


class Lack(NamedTuple):
    """Taken when the checkpoint is written, given when the run goes on."""

    why: str
    take: Callable[[Any], Any]
    give: Callable[[Any, Any], None]
    early: bool = False
    """Whether it has to be there before weights are loaded."""
    raises: type[Exception] | None = AssertionError


def take_generators(module):
    return random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002, timm draws from it


def give_generators(module, states):
    for put, state in zip((random.setstate, np.random.set_state, torch.set_rng_state), states, strict=True):
        put(state)


def give_seconds(module, seconds):
    module.budget._spent += seconds


GENERATORS = Lack(
    "draws from the global random number generators, whose state Lightning does not save",
    take_generators,
    give_generators,
)
SLOW = Lack(
    "the slow weights of `lookahead` are a plain list of the module, which no checkpoint holds",
    lambda module: copy.deepcopy(module._slow),
    lambda module, slow: setattr(module, "_slow", copy.deepcopy(slow)),
)
SECONDS = Lack(
    "a TimeBudget saves no state: its clock starts with the fit, so the resumed run has the whole time again",
    lambda module: module.budget.elapsed,
    give_seconds,
)
RESOLUTION = Lack(
    "position embeddings grow with the resolution: a checkpoint of a later stage does not fit a module that stands at "
    "the first",
    attrgetter("mim.image_size"),
    lambda module, size: module.mim.set_resolution(size),
    early=True,
    raises=RuntimeError,
)


class Clock(L.Callback):
    """Every batch takes a second."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def on_train_batch_start(self, *_):
        self.now += 1.0


def by_the_clock():
    clock = Clock()
    return small_data(Recipe(), TimeBudget(14.0, clock=clock)), [clock]


class Case(NamedTuple):
    build: Callable[[], Any]
    """Gives the module, or it and the callbacks of the run."""
    data: Callable[[], Any] = digits
    lacks: tuple[Lack, ...] = ()


FULL = Recipe(
    whitening=True, celu=0.3, ghosts=2, label_smoothing=0.2, weight_decay=5e-4, centralise=True, rho=0.05, sam_every=3,
    meta=0.5, average=0.9, average_every=3, bias_boost=8.0,
)  # fmt: skip
ALL_BUT_CLARS = ("SkipViT", "GQKVA", "SwiftLearn", "layer dropping", "low rank", "Adan", "sharpness-aware")
CASES = {
    "ImageClassifier": Case(lambda: classified(resnet(), label_smoothing=0.1, channels_last=True)),
    "LanguageModel": Case(lambda: LanguageModel(small_gpt2(), ADAMW), texts),
    "LanguageModel with dropout": Case(
        lambda: LanguageModel(small_gpt2(dropout=0.1), ADAMW), texts, lacks=(GENERATORS,)
    ),
    "MaskedLanguageModel": Case(masked_text, texts),
    "MaskedLanguageModel with dropout": Case(lambda: masked_text(dropout=0.1), texts, lacks=(GENERATORS,)),
    "SequenceClassifier": Case(
        lambda: SequenceClassifier(PretrainedClassifier(bert(), 2, dropout=0.0), ADAMW, num_classes=2), sentences
    ),
    "SequenceClassifier with dropout": Case(
        lambda: SequenceClassifier(PretrainedClassifier(bert(), 2), ADAMW, num_classes=2),
        sentences,
        lacks=(GENERATORS,),
    ),
    "TracedClassifier": Case(traced),
    "SparsityClassifier": Case(sparse),
    "factor freezing, fixed": Case(lambda: (classified(decomposed(resnet())), [FactorFreezing("fixed")])),
    "factor freezing, in turns": Case(lambda: (classified(decomposed(resnet())), [FactorFreezing("sequential")])),
    "factor freezing, in turns of three": Case(
        lambda: (classified(decomposed(resnet())), [FactorFreezing("sequential", period=3, start="outer")])
    ),
    "hardware-aware LRD": Case(lambda: classified(decompose_model(net := resnet(), policy(net, "all")))),
    "LRD study, merged": Case(lambda: classified(merge_bottlenecks(resnet()))),
    "LRD study, branched": Case(lambda: classified(decompose_model(resnet(), {"layer1.0.conv2": (2, 2)}, branches=2))),
    "PLRD": Case(family_member, texts),
    **{
        f"OREPA, {kind}": Case(lambda kind=kind: classified(convert(resnet(), kind), MOMENTUM))
        for kind in ("dbb", "orepa", "orepa-fused", "orepa-unscaled", "normed-branches", "repvgg", "repvgg-orepa")
    },
    **{f"convolutions in 4D, {kind}": Case(lambda kind=kind: clips(kind)) for kind in ("add", "cat", "rank-1")},
    "GQKVA": Case(lambda: classified(group_attention(vit(), "GQKVA-3.2"))),
    "SkipViT": Case(lambda: classified(skip_tokens(vit(), split=1, rejoin=3))),
    "SkipViT at random": Case(
        lambda: classified(skip_tokens(vit(), split=1, rejoin=3, select="random")), lacks=(GENERATORS,)
    ),
    "small data, plain": Case(lambda: small_data(Recipe())),
    "small data, everything": Case(lambda: small_data(FULL)),
    "small data, lookahead": Case(lambda: small_data(Recipe(lookahead=True)), lacks=(SLOW,)),
    "small data, by the clock": Case(by_the_clock, lacks=(SECONDS,)),
    "CLARS": Case(large_batch),
    "adversarial, none": Case(lambda: adversarial("none")),
    "adversarial, FGSM": Case(lambda: adversarial("zero", all_statistics=True)),
    "adversarial, FGSM-RS": Case(lambda: adversarial("random"), lacks=(GENERATORS,)),
    "adversarial, FGSM-SDI": Case(lambda: adversarial("learned", schedule_epochs=6)),
    "adversarial, PGD": Case(lambda: adversarial("many"), lacks=(GENERATORS,)),
    "FastHebb, swta": Case(lambda: hebbian("swta"), digits_in_twos),
    "FastHebb, hpca": Case(lambda: hebbian("hpca"), digits_in_twos),
    "FastHebb, fine-tuning": Case(lambda: fine_tuned(0.0)),
    "FastHebb, fine-tuning with dropout": Case(lambda: fine_tuned(0.5), lacks=(GENERATORS,)),
    "FastMIM": Case(lambda: masked_images(8), lacks=(GENERATORS,)),
    "FastMIM at sizes that grow after": Case(lambda: masked_images(8, 12), lacks=(GENERATORS,)),
    "FastMIM at sizes that grew before": Case(lambda: masked_images(8, 12, 16, 20), lacks=(RESOLUTION, GENERATORS)),
    "FastMIM, fine-tuning": Case(from_encoder),
    "FastMIM, fine-tuning on mixtures": Case(
        lambda: from_encoder(0.2, mixup=0.8, cutmix=1.0, erase=0.25), lacks=(GENERATORS,)
    ),
    "few shots, base classes": Case(
        lambda: BaseTraining(
            small_detector(8, side=64, widths=(4, 4, 8, 8), dim=16, anchors=(16, 28), proposals=10), ADAMW
        ),
        scenes,
        lacks=(GENERATORS,),
    ),
    "compressed GPT-2, pre-training": Case(distilled_text, texts),
    "compressed GPT-2, pre-training with dropout": Case(
        lambda: distilled_text(dropout=0.1), texts, lacks=(GENERATORS,)
    ),
    **{f"compressed GPT-2, {hint}": Case(lambda hint=hint: distilled_classes(hint), sentences) for hint in gpt.HINTS},
    "stack of all but CLARS": Case(lambda: stack(*ALL_BUT_CLARS, warmup=1, refresh=1), chosen_digits),
    "stack with CLARS": Case(lambda: stack("CLARS", "SwiftLearn", "low rank", warmup=1), chosen_digits),
    "snapshots": Case(lambda: (classified(mlp()), [Snapshots(4)])),
    "traces": Case(lambda: (classified(mlp()), [TraceCallback(samples=2)])),
}

# ---------------------------------------------------------------- runs


def asked_late(data):
    """Lets seeded data ask for the epoch when the first batch is drawn.

    A module that asks for the length of the run makes Lightning start the iterator before it loads the epoch.
    """
    if isinstance(data, SeededData):
        batches = data._train

        def late():
            yield from batches()

        data._train = late
    return data


class Interrupt(Checkpoint):
    """Saves a checkpoint after some epochs, as the last of all callbacks, and ends the run."""

    def __init__(self, path, lacks):
        self.path, self.lacks, self.taken = path, lacks, []

    def on_train_epoch_end(self, trainer, pl_module):
        if trainer.current_epoch + 1 == SAVED:
            trainer.save_checkpoint(self.path)
            self.taken = [lack.take(pl_module) for lack in self.lacks]
            trainer.should_stop = True


class Watch(L.Callback):
    """Notes the epochs and gives what a checkpoint lacked."""

    def __init__(self, given):
        self.given, self.epochs = given, []

    def setup(self, trainer, pl_module, stage):
        for lack, what in self.given.items():
            if lack.early:
                lack.give(pl_module, what)

    def on_train_epoch_start(self, trainer, pl_module):
        for lack, what in self.given.items():
            if not self.epochs and not lack.early:
                lack.give(pl_module, what)
        self.epochs.append(trainer.current_epoch)


def weights(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def different(some, others):
    assert some.keys() == others.keys()
    return [name for name in some if not torch.equal(some[name], others[name])]


def run(case, *callbacks, given=None, built=SEED, fitted=SEED, checkpoint=None, prepare=asked_late):
    """One run, made as an experiment makes it; the seeds are those of the weights and of what is drawn in training."""
    L.seed_everything(built, verbose=False)
    made = case.build()
    module, own = made if isinstance(made, tuple) else (made, [])
    data, first, watch = prepare(case.data()), weights(module), Watch(given or {})
    data.set_seed(SEED)
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary"), False)
    trainer = L.Trainer(
        max_epochs=EPOCHS, accelerator="cpu", num_sanity_val_steps=0, callbacks=[watch, *own, *callbacks],
        enable_checkpointing=bool(callbacks), **quiet,
    )  # fmt: skip
    L.seed_everything(fitted, verbose=False)
    trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    return SimpleNamespace(first=first, module=module, trainer=trainer, own=own, epochs=watch.epochs)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """By name of a case: the straight run, the checkpoint of one that was interrupted, and what that lacks."""

    @cache
    def made(name):
        case, path = CASES[name], tmp_path_factory.mktemp("resume") / "half.ckpt"
        interrupt = Interrupt(path, case.lacks)
        half = run(case, interrupt)
        assert half.epochs == list(range(SAVED))
        return run(case), path, dict(zip(case.lacks, interrupt.taken, strict=True))

    return made


def metrics(trainer):
    """What the last epoch logged, but for seconds and for attacks whose start is drawn at random."""
    return {k: v for k, v in trainer.callback_metrics.items() if k not in ("importance_s", "val_pgd")}


@pytest.mark.parametrize("name", CASES)
def test_a_run_goes_on_where_it_stopped_to_the_last_bit(name, runs):
    """From other weights, under other random numbers; what the checkpoint lacks is handed over."""
    straight, path, taken = runs(name)
    saved, end = torch.load(path, weights_only=True), weights(straight.module)
    assert different(saved["state_dict"], straight.first), "it has learned before the checkpoint"
    assert different(saved["state_dict"], end), "and after it"
    assert 0 < saved["global_step"] < straight.trainer.global_step
    resumed = run(CASES[name], given=taken, built=OTHER, fitted=OTHER, checkpoint=path)
    assert different(resumed.first, straight.first), "the checkpoint has to replace another start"
    assert resumed.epochs == straight.epochs[SAVED:] != []
    assert different(weights(resumed.module), end) == []
    assert resumed.trainer.global_step == straight.trainer.global_step
    assert different(metrics(resumed.trainer), metrics(straight.trainer)) == []


@pytest.mark.parametrize(
    ("name", "lack"),
    [
        pytest.param(
            name, lack, id=name, marks=pytest.mark.xfail(strict=True, raises=lack.raises, reason=f"{name}: {lack.why}")
        )
        for name, case in CASES.items()
        for lack in case.lacks[:1]
    ],
)
def test_a_checkpoint_alone_is_enough_to_go_on(name, lack, runs):
    """Seeded as an experiment seeds a run."""
    straight, path, taken = runs(name)
    others = {other: what for other, what in taken.items() if other is not lack}
    resumed = run(CASES[name], given=others, checkpoint=path)
    assert different(weights(resumed.module), weights(straight.module)) == []


@pytest.mark.parametrize("name", ["ImageClassifier", "SequenceClassifier"])
@pytest.mark.xfail(
    strict=True,
    raises=AssertionError,
    reason="seeded data ask for the epoch as soon as they are iterated, and a module that asks for the length of the "
    "run makes Lightning do that before it has loaded the epoch: the first epoch after the checkpoint has the batches "
    "of epoch 0",
)
def test_seeded_data_go_on_where_they_stopped(name, runs):
    straight, path, taken = runs(name)
    resumed = run(CASES[name], given=taken, checkpoint=path, prepare=lambda data: data)
    assert different(weights(resumed.module), weights(straight.module)) == []


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("adversarial, FGSM-SDI", lambda r: r.module.generator_updates),
        ("CLARS", lambda r: r.module.step_losses),
        ("stack with CLARS", lambda r: r.module.passes),
        ("snapshots", lambda r: list(r.own[0].weights)),
        ("traces", lambda r: [trace.notes["epoch"] for trace in r.own[0].traces]),
    ],
    ids=["generator_updates", "step_losses", "passes", "Snapshots.weights", "TraceCallback.traces"],
)
@pytest.mark.xfail(
    strict=True,
    raises=AssertionError,
    reason="a plain attribute that no checkpoint holds: after it the run counts and collects from nothing",
)
def test_what_a_run_counts_and_collects_goes_on_too(name, count, runs):
    straight, path, taken = runs(name)
    resumed = run(CASES[name], given=taken, checkpoint=path)
    assert count(resumed) == count(straight)
