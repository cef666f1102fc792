r"""Compressing a decoder: cut layers out of a trained GPT-2 and train on, with or without a teacher.

Paper: Li, El Mesbahi, Kobyzev, Rashid, Mahmud, Anchuri, Hajimolahoseini, Liu, Rezagholizadeh, "A Short Study on
Compressing Decoder-Based Language Models", arXiv 2110.08460. The abstract gives the claims; what it leaves open, such
as the lists of layers and the weights of the losses, is taken from the code that the second author published.

*Truncation* copies the embeddings, the last norm and some of the blocks of a trained parent into a shallower student
of the same width. The student then trains on with the plain language-modelling loss. *Distillation*, as in
DistilGPT2, starts from a truncated parent too, but runs the parent beside the student at every step:

.. math::

    \mathcal L = \alpha_{soft}\, T^2\, \mathrm{KL}\bigl(\sigma(z_T / T) \,\|\, \sigma(z_S / T)\bigr)
        + \alpha_{labels}\, \mathcal L_{LM} + \alpha_{cos}\, \bigl(1 - \cos(h_S, h_T)\bigr)

with logits :math:`z`, last hidden states :math:`h`, :math:`T = 2` and weights 5, 2 and 1. The question of the paper is
whether the parent's forward pass is worth its time.

The models are `GPT2LMHeadModel` and `GPT2ForSequenceClassification` of transformers. :func:`truncate` works on both.
The losses are functions of tensors; :class:`DistilledLanguageModel` and :class:`DistilledClassifier` put them into
Lightning. :func:`clean_lines` is the cleaning of pre-training text that the authors' code does.

Example:
    Halve a GPT-2 and take a step without a teacher:

    >>> _ = torch.manual_seed(0)
    >>> parent = gpt2(vocab_size=50, context=16, width=24, depth=4, heads=2)  # a trained one, in earnest
    >>> student = truncate(parent, select_blocks("alternate", depth=4, keep=2))
    >>> len(student.transformer.h), parent.num_parameters() - student.num_parameters()
    (2, 14448)
    >>> optimizer = torch.optim.AdamW(student.parameters(), 1e-3)
    >>> ids = torch.randint(50, (2, 16))
    >>> loss = next_token_loss(student(ids).logits, ids).mean()
    >>> loss.backward()
    >>> optimizer.step()
"""

from __future__ import annotations

import copy
import itertools
import math
import random
import string
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html.parser import HTMLParser
from typing import Any, Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel, PreTrainedModel

from leantrain.data.sentence_sets import SentenceBatch
from leantrain.training.language_model import LanguageModel, next_token_loss
from leantrain.training.sequence_classifier import SequenceClassifier

__all__ = [
    "HINTS",
    "SELECTIONS",
    "DistilledClassifier",
    "DistilledLanguageModel",
    "LossWeights",
    "Teacher",
    "classifier_from",
    "clean_lines",
    "cosine_loss",
    "distillation_loss",
    "forward_macs",
    "gpt2",
    "has_tag",
    "line_key",
    "patient_loss",
    "perplexity_at",
    "relation_loss",
    "seconds_to",
    "select_blocks",
    "soft_target_loss",
    "soil_lines",
    "truncate",
]

#: Ways to choose the blocks that stay.
SELECTIONS = ("alternate", "ends", "bottom", "top")
#: What a distilled classifier learns from its teacher besides the soft targets.
HINTS = ("none", "patient", "relations")

_Model = TypeVar("_Model", bound=PreTrainedModel)


# ---------------------------------------------------------------- truncation


def select_blocks(selection: str, depth: int, keep: int) -> list[int]:
    """Places of the parent's blocks that stay, from 0.

    Args:
        selection: ``alternate``, every (depth // keep)-th block from the first; ``ends``, evenly from the first to
            the last, both included, as DistilGPT2 starts; ``bottom``, the first ones; ``top``, the last ones.
        depth: Blocks of the parent.
        keep: Blocks of the student, 1 to `depth`.

    Returns:
        Rising places.

    Raises:
        ValueError: If the selection is unknown or `keep` is out of range.

    Example:
        >>> select_blocks("alternate", 12, 6), select_blocks("ends", 12, 6)
        ([0, 2, 4, 6, 8, 10], [0, 2, 4, 7, 9, 11])
    """
    if not 1 <= keep <= depth:
        raise ValueError(f"keep must be 1 to {depth}, the number of the parent's blocks, got {keep}")
    if selection == "alternate":
        return list(range(0, depth, depth // keep))[:keep]
    if selection == "ends":
        gap = (depth - 1) / (keep - 1) if keep > 1 else 0
        return [math.floor(place * gap + 0.5) for place in range(keep)]
    if selection == "bottom":
        return list(range(keep))
    if selection == "top":
        return list(range(depth - keep, depth))
    raise ValueError(f"unknown selection {selection!r}; the selections are {', '.join(SELECTIONS)}")


def truncate(parent: _Model, blocks: Sequence[int]) -> _Model:
    """A student with some of the parent's blocks and all that stands around them.

    The student shares no memory with the parent, which stays as it is. No random number is drawn. With all blocks, the
    student is the parent, to the last bit.

    Args:
        parent: A model of transformers with the blocks of GPT-2 in ``transformer.h``, with or without a head.
        blocks: Places of the blocks that stay, rising, from 0.

    Returns:
        A model of the parent's class, dtype, device and mode, whose parameters all require gradients; its config has
        the new number of layers.

    Raises:
        ValueError: If `blocks` is empty, does not rise, or names a block that the parent does not have.
    """
    whole: Any = parent.transformer  # transformers leaves the type of its parts open
    depth = len(whole.h)
    if not blocks or any(b >= a for b, a in itertools.pairwise(blocks)):
        raise ValueError(f"blocks must rise and must not be empty, got {list(blocks)}")
    if blocks[0] < 0 or blocks[-1] >= depth:
        raise ValueError(f"blocks must be 0 to {depth - 1}, got {list(blocks)}")
    student = copy.deepcopy(parent)
    body: Any = student.transformer
    body.h = nn.ModuleList([body.h[place] for place in blocks])
    for place, block in enumerate(body.h):
        block.attn.layer_idx = place  # where the cache of keys and values has them when text is generated
    student.config.n_layer = len(blocks)
    return student.requires_grad_(True)


def gpt2(
    *,
    vocab_size: int = 50257,
    context: int = 1024,
    width: int = 768,
    depth: int = 12,
    heads: int = 12,
    dropout: float = 0.0,
) -> GPT2LMHeadModel:
    """A fresh GPT-2 with a tied language-modelling head; by default of the size of GPT-2 small.

    Weights start with the standard deviation 0.02 at the width of GPT-2 small and with more at a smaller width, by the
    square root: a narrow model that starts with 0.02 hardly begins to learn in a short run. (The scale is our choice.)

    Args:
        vocab_size: Number of token ids.
        context: Longest sequence.
        width: Width of a token, a multiple of `heads`.
        depth: Blocks.
        heads: Attention heads.
        dropout: Share dropped of embeddings, attention and branches, 0 to below 1.
    """
    config = GPT2Config(
        vocab_size=vocab_size,
        n_positions=context,
        n_embd=width,
        n_layer=depth,
        n_head=heads,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
        resid_pdrop=dropout,
        initializer_range=0.02 * math.sqrt(768 / width),
        use_cache=False,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPT2LMHeadModel(config)


def classifier_from(model: GPT2LMHeadModel, num_classes: int) -> GPT2ForSequenceClassification:
    """A classifier with the weights of a language model and a fresh head on the last token of a sequence.

    Id 0 is the padding: the last token is the last one that is not 0.

    Args:
        model: The language model; it stays as it is.
        num_classes: Number of classes, at least 2.

    Raises:
        ValueError: If there are fewer than two classes.
    """
    if num_classes < 2:
        raise ValueError(f"num_classes must be at least 2, got {num_classes}")
    config = copy.deepcopy(model.config)
    config.num_labels = num_classes
    config.pad_token_id = 0
    classifier = GPT2ForSequenceClassification(config)
    classifier.transformer.load_state_dict(model.transformer.state_dict())
    return classifier.to(model.device)  # type: ignore[arg-type]  # its decorator hides the signature


def forward_macs(
    *, depth: int, width: int = 768, vocab_size: int = 50257, context: int = 1024
) -> dict[Literal["blocks", "attention", "head"], int]:
    """Multiply-accumulates of one token's forward pass, by part.

    Args:
        depth: Blocks.
        width: Width of a token.
        vocab_size: Number of token ids.
        context: Tokens in the sequence. Attention is counted over all of them, as without a causal mask.

    Returns:
        The projections of all blocks (`blocks`), scores and weighted values (`attention`), and the `head`.
    """
    return {
        "blocks": depth * 12 * width**2,
        "attention": depth * 2 * context * width,
        "head": vocab_size * width,
    }


# ---------------------------------------------------------------- distillation


@dataclass(frozen=True)
class LossWeights:
    """Weights of the three parts of the distillation loss, and its temperature; DistilGPT2's by default.

    Attributes:
        soft: Weight of the divergence from the teacher's predictions, at least 0.
        labels: Weight of the language-modelling loss, at least 0.
        cosine: Weight of the cosine between last hidden states, at least 0.
        temperature: Divides the logits before the softmax, above 0.

    Raises:
        ValueError: If a number is out of range.
    """

    soft: float = 5.0
    labels: float = 2.0
    cosine: float = 1.0
    temperature: float = 2.0

    def __post_init__(self) -> None:
        if not all(0 <= weight < math.inf for weight in (self.soft, self.labels, self.cosine)):
            raise ValueError(f"weights must be at least 0 and finite, got {self}")
        _check_temperature(self.temperature)


def soft_target_loss(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    r""":math:`T^2\,\mathrm{KL}` of the student's predictions from the teacher's, at temperature T.

    The factor keeps the size of the gradient roughly the same at all temperatures.

    Args:
        student: Logits ``(..., V)``.
        teacher: Logits of the same shape; no gradient reaches them.
        temperature: T, above 0.

    Returns:
        The mean over all predictions, in nats; a scalar.

    Raises:
        ValueError: If the shapes differ or the temperature is not above 0.
    """
    _check_temperature(temperature)
    if student.shape != teacher.shape:
        raise ValueError(f"logits must have one shape, got {tuple(student.shape)} and {tuple(teacher.shape)}")
    predicted = F.log_softmax(_wide(student).flatten(0, -2) / temperature, dim=-1)
    wanted = F.log_softmax(_wide(teacher.detach()).flatten(0, -2) / temperature, dim=-1)
    return temperature**2 * F.kl_div(predicted, wanted, log_target=True, reduction="batchmean")


def cosine_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """One minus the cosine between hidden states ``(..., D)`` of equal width, averaged; a scalar from 0 to 2."""
    return (1 - F.cosine_similarity(_wide(student), _wide(teacher.detach()), dim=-1)).mean()


def distillation_loss(
    logits: Tensor,
    hidden: Tensor,
    teacher_logits: Tensor,
    teacher_hidden: Tensor,
    ids: Tensor,
    weights: LossWeights | None = None,
) -> Tensor:
    """The loss that DistilGPT2 is pre-trained with: soft targets, labels and hidden states.

    Args:
        logits: The student's, ``(B, N, V)``.
        hidden: The student's last hidden states, behind the last norm, ``(B, N, D)``.
        teacher_logits: The teacher's, ``(B, N, V)``.
        teacher_hidden: The teacher's, ``(B, N, D)``.
        ids: The tokens, int64 ``(B, N)``.
        weights: Weights and temperature; None for DistilGPT2's.

    Returns:
        The loss, a scalar.
    """
    w = weights or LossWeights()
    return (
        w.soft * soft_target_loss(logits, teacher_logits, w.temperature)
        + w.labels * next_token_loss(logits, ids).mean()
        + w.cosine * cosine_loss(hidden, teacher_hidden)
    )


def patient_loss(student: Sequence[Tensor], teacher: Sequence[Tensor], mask: Tensor) -> Tensor:
    """Patient distillation: the student's hidden states should point where the teacher's do.

    Args:
        student: Hidden states behind each of the student's blocks, each ``(B, N, D)``.
        teacher: Those behind the teacher's blocks that they are compared with, as many, of the same shape.
        mask: 1 for a token and 0 for padding, ``(B, N)``.

    Returns:
        Squared distance of the two unit vectors (0 to 4), averaged over tokens and blocks, where the authors' code adds
        blocks up; a scalar.

    Raises:
        ValueError: If there are no states, or not as many of both.
    """
    if not student or len(student) != len(teacher):
        raise ValueError(f"expected as many states of both and at least one, got {len(student)} and {len(teacher)}")
    total = sum(
        (F.normalize(_wide(s), dim=-1) - F.normalize(_wide(t.detach()), dim=-1)).square().sum(-1)
        for s, t in zip(student, teacher, strict=True)
    )
    return (total * mask).sum() / (mask.sum() * len(student))


def relation_loss(student: Tensor, teacher: Tensor, heads: int, mask: Tensor) -> Tensor:
    r"""Distillation in the manner of MiniLM: attention, and the relations among values, of one layer.

    With queries, keys and values of each head, the divergence of the student's
    :math:`\mathrm{softmax}(QK^\top / \sqrt d)` from the teacher's, plus the same for
    :math:`\mathrm{softmax}(VV^\top / \sqrt d)`. Both are causal here, as the decoder's attention is.

    Args:
        student: Output of the projection to queries, keys and values, ``(B, N, 3D)``.
        teacher: The same of the teacher; its width may differ.
        heads: Attention heads, of both.
        mask: 1 for a token and 0 for padding, ``(B, N)``.

    Returns:
        The sum of both divergences in nats, averaged over heads and tokens; a scalar.
    """
    visible = torch.ones(mask.shape[1], mask.shape[1], dtype=torch.bool, device=mask.device).tril()
    visible = visible & mask.bool()[:, None, None, :]
    total = torch.zeros((), device=mask.device)
    for s, t in zip(_relations(student, heads, visible), _relations(teacher.detach(), heads, visible), strict=True):
        divergence = F.kl_div(s, t, log_target=True, reduction="none").sum(-1)  # (B, heads, N)
        total = total + (divergence * mask[:, None]).sum() / (mask.sum() * heads)
    return total


def _relations(qkv: Tensor, heads: int, visible: Tensor) -> tuple[Tensor, Tensor]:
    """Logarithms of attention and of value relations, each ``(B, heads, N, N)``."""
    q, k, v = (_wide(part).unflatten(-1, (heads, -1)).transpose(1, 2) for part in qkv.chunk(3, dim=-1))
    scale = q.shape[-1] ** -0.5

    def related(a: Tensor, b: Tensor) -> Tensor:
        # Not minus infinity: the divergence would multiply it by zero.
        return (a @ b.transpose(-1, -2) * scale).masked_fill(~visible, -1e9).log_softmax(-1)

    return related(q, k), related(v, v)


class Teacher(nn.Module):
    """A model that is only asked: always in evaluation mode, without gradients.

    Args:
        model: The parent; its parameters stop requiring gradients.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> Teacher:
        """Stay in evaluation mode, whatever the module around does."""
        return self


class DistilledLanguageModel(LanguageModel):
    """Pre-train a student beside its teacher, as DistilGPT2 was.

    Args:
        student: A GPT-2, usually truncated from the teacher.
        teacher: The parent, with the same vocabulary and width.
        optimizer: Builds the optimiser; see `LanguageModel`.
        weights: Weights of the loss; None for DistilGPT2's.
        freeze_positions: Whether the student's position embeddings stay as they are, as in DistilGPT2's recipe.
        warmup_fraction: Share of the optimiser steps that warm up.
        clip: Largest norm of the gradient.

    Raises:
        ValueError: If vocabulary or width differ.
    """

    model: GPT2LMHeadModel

    def __init__(
        self,
        student: GPT2LMHeadModel,
        teacher: GPT2LMHeadModel,
        optimizer: Callable[[list[dict[str, Any]]], Optimizer],
        *,
        weights: LossWeights | None = None,
        freeze_positions: bool = True,
        warmup_fraction: float = 0.1,
        clip: float | None = 1.0,
    ) -> None:
        super().__init__(student, optimizer, warmup_fraction=warmup_fraction, clip=clip)
        for what in ("vocab_size", "hidden_size"):
            pair = getattr(student.config, what), getattr(teacher.config, what)
            if pair[0] != pair[1]:
                raise ValueError(f"student and teacher must have one {what}, got {pair[0]} and {pair[1]}")
        self.teacher = Teacher(teacher)
        self.weights = weights or LossWeights()
        if freeze_positions:
            student.transformer.wpe.weight.requires_grad_(False)

    def loss(self, ids: Tensor) -> Tensor:
        """Distillation loss of a batch of ids ``(B, N)``, a scalar."""
        with torch.no_grad():
            teacher_hidden, teacher_logits = _states_and_logits(self.teacher.model, ids)
        hidden, logits = _states_and_logits(self.model, ids)
        return distillation_loss(logits, hidden, teacher_logits, teacher_hidden, ids, self.weights)


def _states_and_logits(model: GPT2LMHeadModel, ids: Tensor) -> tuple[Tensor, Tensor]:
    hidden = model.transformer(ids).last_hidden_state
    return hidden, model.lm_head(hidden)


class DistilledClassifier(SequenceClassifier):
    """Fine-tune a classifier with a fine-tuned teacher beside it.

    The loss is the task's cross-entropy plus `weight` times the distillation: soft targets alone, soft targets and
    patient hidden states, or the relations of the last layer.

    Args:
        student: The classifier that learns.
        teacher: A fine-tuned classifier of the same classes and heads.
        optimizer: Builds the optimiser; see `SequenceClassifier`.
        num_classes: Number of classes.
        hint: ``none`` for soft targets alone, ``patient`` to add :func:`patient_loss`, or ``relations`` for
            :func:`relation_loss` in their place.
        blocks: The teacher's blocks that the student's are compared with, one each, if the hint is ``patient``; None
            for those of the selection ``ends``.
        weight: Weight of the distillation, at least 0.
        temperature: Temperature of the soft targets, above 0.
        warmup_fraction: Share of the optimiser steps that warm up.
        clip: Largest norm of the gradient.

    Raises:
        ValueError: If the hint is unknown, a number is out of range, the blocks do not fit, or the heads differ.
    """

    model: GPT2ForSequenceClassification

    def __init__(
        self,
        student: GPT2ForSequenceClassification,
        teacher: GPT2ForSequenceClassification,
        optimizer: Callable[[list[dict[str, Any]]], Optimizer],
        *,
        num_classes: int,
        hint: str = "none",
        blocks: Sequence[int] | None = None,
        weight: float = 0.2,
        temperature: float = 1.0,
        warmup_fraction: float = 0.06,
        clip: float | None = 1.0,
    ) -> None:
        super().__init__(student, optimizer, num_classes=num_classes, warmup_fraction=warmup_fraction, clip=clip)
        if hint not in HINTS:
            raise ValueError(f"unknown hint {hint!r}; the hints are {', '.join(HINTS)}")
        if not 0 <= weight < math.inf:
            raise ValueError(f"weight must be at least 0 and finite, got {weight}")
        _check_temperature(temperature)
        depth, keep = len(teacher.transformer.h), len(student.transformer.h)
        places = select_blocks("ends", depth, keep) if blocks is None else list(blocks)
        if len(places) != keep or not all(0 <= place < depth for place in places):
            raise ValueError(
                f"blocks must be {keep} places of 0 to {depth - 1}, one for each of the student's, got {places}"
            )
        if hint == "relations" and student.config.n_head != teacher.config.n_head:
            raise ValueError(f"heads must be equal, got {student.config.n_head} and {teacher.config.n_head}")
        self.teacher = Teacher(teacher)
        self.hint = hint
        self.blocks = places
        self.weight = weight
        self.temperature = temperature

    def loss(self, batch: SentenceBatch) -> Tensor:
        """Task loss and distillation of one batch, a scalar."""
        watched, theirs = self._watched()
        with _outputs(theirs) as wanted, torch.no_grad():
            teacher_logits = self.teacher.model(input_ids=batch.ids, attention_mask=batch.mask).logits
        with _outputs(watched) as states:
            logits = self(batch.ids, batch.mask)
        task = F.cross_entropy(logits, batch.y)
        if self.hint == "relations":
            heads = self.model.config.n_head
            return task + self.weight * relation_loss(states[0], wanted[0], heads, batch.mask)
        extra = soft_target_loss(logits, teacher_logits, self.temperature)
        if self.hint == "patient":
            extra = extra + patient_loss(states, wanted, batch.mask)
        return task + self.weight * extra

    def _watched(self) -> tuple[list[nn.Module], list[nn.Module]]:
        """The parts of student and teacher whose outputs the hint compares."""
        ours, theirs = self.model.transformer.h, self.teacher.model.transformer.h
        if self.hint == "patient":
            return list(ours), [theirs[place] for place in self.blocks]
        if self.hint == "relations":
            return [ours[-1].get_submodule("attn.c_attn")], [theirs[-1].get_submodule("attn.c_attn")]
        return [], []


@contextmanager
def _outputs(modules: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """The modules' outputs, in their order, once each of them has run within the block."""
    found: list[Any] = [None] * len(modules)

    def keep(place: int) -> Callable[[nn.Module, Any, Tensor], None]:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            found[place] = output

        return hook

    handles = [module.register_forward_hook(keep(place)) for place, module in enumerate(modules)]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _wide(x: Tensor) -> Tensor:
    """Half precision is too coarse for a loss; float64 stays as it is."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def _check_temperature(temperature: float) -> None:
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be above 0 and finite, got {temperature}")


# ---------------------------------------------------------------- reading learning curves


def perplexity_at(seconds: Sequence[float], perplexity: Sequence[float], at: float) -> float:
    """Perplexity of a run after some time, between two validations on the straight line of its logarithm.

    Args:
        seconds: Training time at each validation, rising.
        perplexity: What was measured there.
        at: The time. Before the first validation the first value counts, after the last one the last: a run that has
            ended keeps its model.

    Raises:
        ValueError: If the curve has no point, the lengths differ, or time does not rise.
    """
    _check_curve(seconds, perplexity)
    if at <= seconds[0]:
        return perplexity[0]
    for i in range(1, len(seconds)):
        if at <= seconds[i]:
            share = (at - seconds[i - 1]) / (seconds[i] - seconds[i - 1])
            return math.exp((1 - share) * math.log(perplexity[i - 1]) + share * math.log(perplexity[i]))
    return perplexity[-1]


def seconds_to(seconds: Sequence[float], perplexity: Sequence[float], target: float) -> float | None:
    """Training time at which a run first reaches a perplexity, between validations as in :func:`perplexity_at`.

    Args:
        seconds: Training time at each validation, rising.
        perplexity: What was measured there.
        target: The perplexity to reach.

    Returns:
        The time, or None if the run never reaches it.

    Raises:
        ValueError: If the curve has no point, the lengths differ, or time does not rise.
    """
    _check_curve(seconds, perplexity)
    for i, value in enumerate(perplexity):
        if value <= target:
            if i == 0:
                return seconds[0]
            above, below = math.log(perplexity[i - 1]), math.log(value)
            share = (above - math.log(target)) / (above - below)
            return seconds[i - 1] + share * (seconds[i] - seconds[i - 1])
    return None


def _check_curve(seconds: Sequence[float], perplexity: Sequence[float]) -> None:
    if len(seconds) != len(perplexity) or not len(seconds):
        raise ValueError(f"expected a perplexity for each time, got {len(perplexity)} and {len(seconds)}")
    if any(b <= a for a, b in itertools.pairwise(seconds)):
        raise ValueError(f"times must rise, got {list(seconds)}")


# ---------------------------------------------------------------- cleaning text


class _TagFinder(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found = True

    def handle_endtag(self, tag: str) -> None:
        self.found = True


def has_tag(line: str) -> bool:
    """Whether Python's HTML parser finds a tag in a line: in `<b>x`, but not in `a < b`."""
    finder = _TagFinder()
    finder.feed(line)
    finder.close()
    return finder.found


def line_key(line: str) -> tuple[int, tuple[str, ...], tuple[str, ...]]:
    """What makes two lines duplicates: the length without punctuation, the first four words and the last four."""
    words = line.split()
    return len(line.translate(_NO_PUNCTUATION)), tuple(words[:4]), tuple(words[-4:])


_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def clean_lines(lines: Iterable[str], *, no_tags: Sequence[str] = ()) -> list[str]:
    """Drop duplicates and markup from a text, in one pass.

    A line is dropped if its key was seen before (see :func:`line_key`; two different lines can share one), or if an
    HTML parser finds a tag in it. Lines without a word are kept.

    Args:
        lines: Lines, or paragraphs.
        no_tags: Strings that look like tags and are none, such as the `<unk>` of WikiText.

    Returns:
        The lines that stay, in their order, unchanged.
    """
    seen, kept = set(), []
    for line in lines:
        text = line
        for no_tag in no_tags:
            text = text.replace(no_tag, "")
        key = line_key(line)
        if not line.strip() or (key not in seen and not has_tag(text)):
            kept.append(line)
        seen.add(key)
    return kept


_BOILERPLATE = (
    '<div class="nav"><a href="/page/{0}">next</a> <a href="/page/{1}">previous</a></div>',
    "<p>Share this article: <a href='/share?id={0}'>{1} shares</a></p>",
    '<img src="/images/{0}.jpg" width="{1}" /><br>',
    "<li><b>Advertisement {0}</b> Subscribe to our newsletter for {1} free issues.</li>",
    '<span class="comment-{0}">{1} comments</span> <a href="#top">back to top</a>',
)


def soil_lines(lines: Sequence[str], *, duplicates: float, markup: float, seed: int) -> list[str]:
    """Put duplicates and markup into a clean text, at random places, so that cleaning has something to do.

    Args:
        lines: The clean lines.
        duplicates: Further copies of lines, as a share of the number of lines, at least 0.
        markup: Lines of web boilerplate, as a share of the number of lines, at least 0.
        seed: Seed of the choice and the places.

    Returns:
        All clean lines in their order, and the dirt among them. A copy never stands before its original, so that
        cleaning gives back the order.

    Raises:
        ValueError: If a share is negative or not finite.
    """
    for name, share in (("duplicates", duplicates), ("markup", markup)):
        if not 0 <= share < math.inf:
            raise ValueError(f"{name} must be at least 0 and finite, got {share}")
    generator = random.Random(seed)
    dirt: list[tuple[int, str]] = []
    for _ in range(round(duplicates * len(lines))):
        place = generator.randrange(len(lines))
        dirt.append((place, lines[generator.randrange(place + 1)]))
    for _ in range(round(markup * len(lines))):
        form = generator.choice(_BOILERPLATE)
        text = form.format(generator.randrange(10_000), generator.randrange(1_000)) + "\n"
        dirt.append((generator.randrange(len(lines)), text))
    behind: list[list[str]] = [[] for _ in lines]
    for place, line in dirt:
        behind[place].append(line)
    return [line for clean, extra in zip(lines, behind, strict=True) for line in (clean, *extra)]
