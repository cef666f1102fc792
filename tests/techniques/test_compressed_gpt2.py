"""Compressed GPT-2: sizes, truncation to the bit, losses against references, gradients, curves, cleaning, errors."""

from __future__ import annotations

import logging
import math
from functools import partial

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader
from transformers import GPT2ForSequenceClassification

from leantrain.data.sentence_sets import SentenceBatch
from leantrain.measure import count_macs, count_parameters
from leantrain.techniques.compressed_gpt2 import (
    SELECTIONS,
    DistilledClassifier,
    DistilledLanguageModel,
    LossWeights,
    Teacher,
    classifier_from,
    clean_lines,
    cosine_loss,
    distillation_loss,
    forward_macs,
    gpt2,
    has_tag,
    line_key,
    patient_loss,
    perplexity_at,
    relation_loss,
    seconds_to,
    select_blocks,
    soft_target_loss,
    soil_lines,
    truncate,
)
from leantrain.training.language_model import next_token_loss

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:Found .* in eval mode at the start of training"),
    pytest.mark.filterwarnings("ignore:.*have no `val_dataloader`"),
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated"),
]

ADAMW = partial(torch.optim.AdamW, lr=1e-2)


def small(depth=4, seed=0, **options):
    torch.manual_seed(seed)
    model = gpt2(**{"vocab_size": 40, "context": 12, "width": 24, "heads": 3} | options, depth=depth)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return model


def some_ids(batch=3, length=10, vocab=40):
    return torch.randint(vocab, (batch, length), generator=torch.Generator().manual_seed(7))


def trainer(**options):
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return L.Trainer(accelerator="cpu", num_sanity_val_steps=0, **quiet, **options)


# ---------------------------------------------------------------- which blocks


@pytest.mark.parametrize(
    ("selection", "depth", "keep", "blocks"),
    [
        ("alternate", 12, 6, [0, 2, 4, 6, 8, 10]),
        ("ends", 12, 6, [0, 2, 4, 7, 9, 11]),
        ("bottom", 12, 6, [0, 1, 2, 3, 4, 5]),
        ("top", 12, 6, [6, 7, 8, 9, 10, 11]),
        ("ends", 12, 3, [0, 6, 11]),
        ("alternate", 8, 4, [0, 2, 4, 6]),
        ("ends", 8, 4, [0, 2, 5, 7]),
        ("alternate", 24, 6, [0, 4, 8, 12, 16, 20]),
        ("ends", 5, 1, [0]),
    ],
)
def test_the_lists_of_the_authors_code(selection, depth, keep, blocks):
    assert select_blocks(selection, depth, keep) == blocks


@given(st.sampled_from(SELECTIONS), st.integers(1, 60), st.data())
def test_every_selection_rises_within_the_parent(selection, depth, data):
    keep = data.draw(st.integers(1, depth))
    blocks = select_blocks(selection, depth, keep)
    assert len(blocks) == keep
    assert blocks == sorted(set(blocks))
    assert 0 <= blocks[0] <= blocks[-1] < depth
    assert keep < depth or blocks == list(range(depth))


@pytest.mark.parametrize("keep", [0, -1, 13])
def test_a_number_of_blocks_out_of_range_is_named(keep):
    with pytest.raises(ValueError, match=f"1 to 12.*{keep}"):
        select_blocks("alternate", 12, keep)


def test_an_unknown_selection_lists_the_known():
    with pytest.raises(ValueError, match=r"'middle'.*alternate, ends, bottom, top"):
        select_blocks("middle", 12, 6)


# ---------------------------------------------------------------- sizes


@pytest.mark.parametrize(("keep", "parameters"), [(12, 124_439_808), (6, 81_912_576), (3, 60_648_960)])
def test_parameters_of_gpt2_small_and_its_parts(keep, parameters):
    with torch.device("meta"):
        student = truncate(gpt2(), select_blocks("ends", 12, keep))
    assert count_parameters(student) == parameters
    assert parameters == 50257 * 768 + 1024 * 768 + 2 * 768 + keep * 7_087_872


@pytest.mark.parametrize("depth", [12, 6])
def test_multiplications_of_the_real_sizes(depth):
    parts = forward_macs(depth=depth)
    with torch.device("meta"):
        ids, mask = torch.zeros(1, 1024, dtype=torch.long), torch.ones(1, 1, 1024, 1024, dtype=torch.bool)
        # With a mask of its own, the model does not look at values, which the meta device has not.
        macs = count_macs(gpt2(depth=depth).eval(), ids, None, mask)
    assert macs == 1024 * sum(parts.values())
    assert sum(parts.values()) / 1e6 == pytest.approx({12: 142.4, 6: 90.5}[depth], abs=0.05)


def test_a_distillation_step_costs_one_and_a_half_plain_ones():
    parent, student = (sum(forward_macs(depth=depth).values()) for depth in (12, 6))
    assert (3 * student + parent) / (3 * student) == pytest.approx(1.52, abs=0.005)


# ---------------------------------------------------------------- truncation


def test_all_blocks_give_the_parent_to_the_bit():
    parent = small().eval()
    assert torch.equal(truncate(parent, range(4))(some_ids()).logits, parent(some_ids()).logits)


@pytest.mark.parametrize("blocks", [[0], [0, 2], [1, 3], [0, 1, 3]])
def test_every_tensor_is_a_copy_of_the_parents(blocks):
    parent = small()
    before = {name: tensor.clone() for name, tensor in parent.state_dict().items()}
    student = truncate(parent, blocks)
    for name, tensor in student.state_dict().items():
        _, _, tail = name.partition("transformer.h.")
        place, _, rest = tail.partition(".")
        source = f"transformer.h.{blocks[int(place)]}.{rest}" if tail else name
        assert torch.equal(tensor, before[source]), name
    assert student.config.n_layer == len(student.transformer.h) == len(blocks)
    assert parent.config.n_layer == 4, "the parent's own config stays"
    assert student.lm_head.weight is student.transformer.wte.weight
    assert student.transformer.config is student.config
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.zero_()
    assert all(torch.equal(tensor, before[name]) for name, tensor in parent.state_dict().items())


def test_a_student_computes_the_parents_blocks_in_turn():
    parent = small().double().eval()
    ids = some_ids()
    x = parent.transformer.wte(ids) + parent.transformer.wpe(torch.arange(ids.shape[1]))
    for place in (1, 3):
        x = parent.transformer.h[place](x)
    expected = parent.transformer.ln_f(x) @ parent.transformer.wte.weight.T
    torch.testing.assert_close(truncate(parent, [1, 3])(ids).logits, expected, atol=1e-12, rtol=1e-12)


def test_blocks_that_add_nothing_can_go():
    parent = small().eval()
    with torch.no_grad():
        for place in (1, 3):
            for part in (parent.transformer.h[place].attn.c_proj, parent.transformer.h[place].mlp.c_proj):
                part.weight.zero_()
                part.bias.zero_()
    assert torch.equal(truncate(parent, [0, 2])(some_ids()).logits, parent(some_ids()).logits)
    assert not torch.allclose(truncate(parent, [1, 3])(some_ids()).logits, parent(some_ids()).logits)


def test_truncation_draws_no_random_number_and_keeps_dtype_and_mode():
    parent = small().double().eval()
    torch.manual_seed(3)
    expected = torch.rand(())
    torch.manual_seed(3)
    student = truncate(parent, [0, 2])
    assert torch.rand(()) == expected
    assert {p.dtype for p in student.parameters()} == {torch.float64}
    assert not student.training


def test_a_student_of_a_frozen_parent_can_learn():
    parent = small()
    Teacher(parent)
    student = truncate(parent, [0, 2])
    assert all(p.requires_grad for p in student.parameters())
    assert not any(p.requires_grad for p in parent.parameters())


def test_generation_with_the_cache_agrees_with_generation_without():
    student = truncate(small().eval(), [1, 3])
    start = some_ids(1, 4)
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    cached, plain = (student.generate(start, use_cache=cache, **options) for cache in (True, False))
    assert cached.shape == (1, 10)
    assert torch.equal(cached, plain)


def test_a_student_can_be_saved_and_loaded(tmp_path):
    student = truncate(small().eval(), [0, 3])
    student.save_pretrained(tmp_path)
    again = type(student).from_pretrained(tmp_path).eval()
    assert torch.equal(again(some_ids()).logits, student(some_ids()).logits)


@pytest.mark.parametrize("blocks", [[], [0, 0], [2, 1], [-1, 2], [0, 4]])
def test_lists_of_blocks_that_do_not_fit_are_refused(blocks):
    with pytest.raises(ValueError, match=r"blocks must"):
        truncate(small(), blocks)


def test_a_classifier_reads_the_last_token_that_is_no_padding():
    model = small().eval()
    classifier = classifier_from(model, 3).eval()
    assert isinstance(classifier, GPT2ForSequenceClassification)
    ids = torch.tensor([[5, 6, 7, 0, 0], [5, 6, 7, 8, 9]])
    mask = (ids > 0).long()
    logits = classifier(input_ids=ids, attention_mask=mask).logits
    hidden = model.transformer(ids[:1, :3]).last_hidden_state[:, -1]
    torch.testing.assert_close(logits[:1], hidden @ classifier.score.weight.T, atol=1e-5, rtol=1e-5)
    assert logits.shape == (2, 3)
    student = truncate(classifier, [0, 2])
    assert torch.equal(student.score.weight, classifier.score.weight)
    assert student(input_ids=ids, attention_mask=mask).logits.shape == (2, 3)
    with torch.no_grad():
        classifier.transformer.wte.weight.zero_()
    assert model.transformer.wte.weight.abs().max() > 0
    with pytest.raises(ValueError, match="at least 2"):
        classifier_from(model, 1)


# ---------------------------------------------------------------- losses


def test_soft_targets_are_the_divergence_by_hand():
    s, t = torch.randn(2, 3, 5, dtype=torch.float64), torch.randn(2, 3, 5, dtype=torch.float64)
    for temperature in (1.0, 2.0, 5.0):
        p, q = (t / temperature).softmax(-1), (s / temperature).softmax(-1)
        expected = temperature**2 * (p * (p.log() - q.log())).sum(-1).mean()
        torch.testing.assert_close(soft_target_loss(s, t, temperature), expected)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.5, 8))
def test_soft_targets_ignore_a_constant_and_vanish_for_equals(seed, temperature):
    torch.manual_seed(seed)
    s, t = torch.randn(2, 4, 6, dtype=torch.float64), torch.randn(2, 4, 6, dtype=torch.float64)
    value = soft_target_loss(s, t, temperature)
    assert value > 0
    shifted = soft_target_loss(s + 3 * torch.randn(2, 4, 1, dtype=torch.float64), t - 100, temperature)
    torch.testing.assert_close(shifted, value, rtol=1e-9, atol=1e-12)
    assert soft_target_loss(t, t, temperature).abs() < 1e-12


def test_the_square_of_the_temperature_keeps_the_gradient():
    torch.manual_seed(0)
    t, sizes = 0.1 * torch.randn(8, 10), {}
    for temperature in (1.0, 4.0):
        s = (0.1 * torch.randn(8, 10, generator=torch.Generator().manual_seed(1))).requires_grad_()
        soft_target_loss(s, t, temperature).backward()
        sizes[temperature] = s.grad.norm().item()
    assert 0.5 < sizes[4.0] / sizes[1.0] < 2


def test_the_gradient_of_soft_targets_is_that_of_finite_differences_and_reaches_the_student_only():
    s = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    t = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: soft_target_loss(x, t.detach(), 2.0), s)
    soft_target_loss(s, t, 2.0).backward()
    assert t.grad is None


def test_the_cosine_looks_at_directions():
    h = torch.randn(2, 3, 8)
    assert cosine_loss(5 * h, h).abs() < 1e-6
    assert cosine_loss(-h, h).item() == pytest.approx(2)
    a, b = torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 1.0]])
    assert cosine_loss(a, b).item() == pytest.approx(1 - 0.5**0.5)


def test_the_distillation_loss_is_its_parts():
    torch.manual_seed(0)
    z, h, zt, ht = torch.randn(2, 6, 9), torch.randn(2, 6, 4), torch.randn(2, 6, 9), torch.randn(2, 6, 4)
    ids = torch.randint(9, (2, 6))
    parts = {
        "soft": soft_target_loss(z, zt, 2.0),
        "labels": next_token_loss(z, ids).mean(),
        "cosine": cosine_loss(h, ht),
    }
    whole = distillation_loss(z, h, zt, ht, ids)
    torch.testing.assert_close(whole, 5 * parts["soft"] + 2 * parts["labels"] + parts["cosine"])
    for name, value in parts.items():
        alone = LossWeights(**{"soft": 0.0, "labels": 0.0, "cosine": 0.0} | {name: 3.0})
        torch.testing.assert_close(distillation_loss(z, h, zt, ht, ids, alone), 3 * value)
    torch.testing.assert_close(distillation_loss(zt, ht, zt, ht, ids), 2 * next_token_loss(zt, ids).mean())


def test_patient_states_are_compared_by_direction_and_padding_does_not_count():
    torch.manual_seed(0)
    states = [torch.randn(2, 4, 6, dtype=torch.float64) for _ in range(3)]
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
    assert patient_loss([2 * s for s in states], states, mask).abs() < 1e-12
    assert patient_loss([-s for s in states], states, mask).item() == pytest.approx(4)
    other = [torch.randn_like(s) for s in states]
    expected = sum(
        (F.normalize(a[b, n], dim=0) - F.normalize(c[b, n], dim=0)).square().sum()
        for a, c in zip(states, other, strict=True)
        for b, n in mask.nonzero().tolist()
    ) / (5 * 3)
    torch.testing.assert_close(patient_loss(states, other, mask), expected)
    spoiled = [s.clone() for s in states]
    for s in spoiled:
        s[mask == 0] = 100.0
    torch.testing.assert_close(patient_loss(spoiled, other, mask), patient_loss(states, other, mask))
    with pytest.raises(ValueError, match="3 and 2"):
        patient_loss(states, other[:2], mask)


def relations_by_hand(qkv, heads, mask):
    """Attention and value relations of every head and query as probabilities, in a loop."""
    q, k, v = qkv.chunk(3, -1)
    d = q.shape[-1] // heads
    for a, b in ((q, k), (v, v)):
        for i, row in enumerate(mask.tolist()):
            for r in range(heads):
                for n in range(sum(row)):
                    cut = slice(r * d, (r + 1) * d)
                    yield (b[i, : n + 1, cut] @ a[i, n, cut] / d**0.5).softmax(0)


def test_relations_are_those_of_a_loop_and_padding_does_not_count():
    torch.manual_seed(0)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    s, t = torch.randn(2, 5, 3 * 8, dtype=torch.float64), torch.randn(2, 5, 3 * 12, dtype=torch.float64)
    pairs = zip(relations_by_hand(s, 2, mask), relations_by_hand(t, 2, mask), strict=True)
    expected = sum((p * (p.log() - q.log())).sum() for q, p in pairs) / (mask.sum() * 2)
    torch.testing.assert_close(relation_loss(s, t, 2, mask), expected)
    assert relation_loss(t, t, 2, mask).abs() < 1e-12
    spoiled = s.clone()
    spoiled[mask == 0] = 50.0
    torch.testing.assert_close(relation_loss(spoiled, t, 2, mask), expected)
    spoiled.requires_grad_()
    relation_loss(spoiled, t, 2, mask).backward()
    assert spoiled.grad.isfinite().all()
    assert spoiled.grad[mask == 0].abs().max() == 0


def test_the_relations_see_the_attention_of_the_model():
    """The projection that is watched gives the probabilities with which the model attends."""
    model = small(depth=1)
    model.set_attn_implementation("eager")
    ids = some_ids(1, 6)
    seen = []
    handle = model.transformer.h[0].attn.c_attn.register_forward_hook(
        lambda module, inputs, output: seen.append(output)
    )
    attention = model.eval()(ids, output_attentions=True).attentions[0][0]
    handle.remove()
    first = relations_by_hand(seen[0], 3, torch.ones(1, 6, dtype=torch.long))
    for r in range(3):
        for n in range(6):
            torch.testing.assert_close(next(first), attention[r, n, : n + 1], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("options", [{"soft": -1.0}, {"cosine": math.nan}, {"temperature": 0.0}, {"labels": math.inf}])
def test_weights_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match="must be"):
        LossWeights(**options)
    if "temperature" in options:
        with pytest.raises(ValueError, match="temperature"):
            soft_target_loss(torch.zeros(1, 2), torch.zeros(1, 2), options["temperature"])


def test_logits_of_two_vocabularies_are_refused():
    with pytest.raises(ValueError, match=r"\(2, 5\) and \(2, 6\)"):
        soft_target_loss(torch.zeros(2, 5), torch.zeros(2, 6))


# ---------------------------------------------------------------- in Lightning


def test_a_distilled_student_comes_closer_to_its_teacher_and_the_teacher_stays():
    parent = small(dropout=0.1)
    before = [p.detach().clone() for p in parent.parameters()]
    weights = LossWeights(labels=0.0)
    module = DistilledLanguageModel(truncate(parent, [0, 3]), parent, ADAMW, weights=weights)
    positions = module.model.transformer.wpe.weight.detach().clone()
    ids = some_ids(8, 10)
    distance = []
    for _ in range(2):
        distance.append(soft_target_loss(module.model.eval()(ids).logits, parent(ids).logits).item())
        module.model.train()
        trainer(max_epochs=30).fit(module, DataLoader(ids, batch_size=8))
    assert distance[1] < 0.5 * distance[0]
    assert not parent.training, "dropout would disturb the teacher"
    assert all(torch.equal(a, b) for a, b in zip(before, parent.parameters(), strict=True))
    assert torch.equal(module.model.transformer.wpe.weight, positions), "frozen, as in DistilGPT2's recipe"


def test_the_loss_of_a_student_that_is_its_teacher_is_the_labels_alone():
    parent = small()
    student = truncate(parent, range(4))
    module = DistilledLanguageModel(student, parent, ADAMW, freeze_positions=False)
    loss = module.loss(some_ids())
    torch.testing.assert_close(
        loss, 2 * next_token_loss(parent(some_ids()).logits, some_ids()).mean(), rtol=1e-4, atol=1e-5
    )
    loss.backward()
    assert all(p.grad is not None for p in student.parameters())
    assert all(p.grad is None for p in parent.parameters())


def test_a_teacher_of_another_shape_is_refused():
    with pytest.raises(ValueError, match="vocab_size, got 40 and 41"):
        DistilledLanguageModel(small(2), small(4, vocab_size=41), ADAMW)
    with pytest.raises(ValueError, match="hidden_size, got 24 and 48"):
        DistilledLanguageModel(small(2), small(4, width=48), ADAMW)


def labelled(count=16):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 40, (count, 8), generator=generator)
    mask = (torch.arange(8) < torch.randint(3, 9, (count, 1), generator=generator)).long()
    return SentenceBatch(ids * mask, mask, (ids[:, 0] > 20).long(), torch.arange(count))


@pytest.mark.parametrize("hint", ["none", "patient", "relations"])
def test_a_classifier_learns_from_its_teacher(hint):
    teacher = classifier_from(small(dropout=0.1), 2)
    options = {"num_classes": 2, "hint": hint, "weight": 1.0}
    module = DistilledClassifier(truncate(teacher, [0, 2]), teacher, ADAMW, **options)
    batch = labelled()
    student = module.model
    distance = {}
    for when in ("before", "after"):
        student.eval()
        with torch.no_grad():
            distance[when] = module.loss(batch).item()
        student.train()
        if when == "before":
            trainer(max_epochs=40).fit(module, DataLoader([batch], batch_size=None))
    assert distance["after"] < 0.8 * distance["before"]
    assert not teacher.training
    assert not any(part._forward_hooks for part in teacher.modules())


def test_the_parts_of_a_classifiers_loss():
    teacher = classifier_from(small(), 2)
    student = truncate(teacher, [0, 3])
    batch = labelled()
    loss = {}
    for hint in ("none", "patient", "relations"):
        for weight in (0.0, 0.2):
            module = DistilledClassifier(student, teacher, ADAMW, num_classes=2, hint=hint, weight=weight)
            loss[hint, weight] = module.loss(batch).item()
    logits = student(input_ids=batch.ids, attention_mask=batch.mask).logits
    task = F.cross_entropy(logits, batch.y).item()
    assert [loss[hint, 0.0] for hint in ("none", "patient", "relations")] == pytest.approx([task] * 3)
    wanted = teacher(input_ids=batch.ids, attention_mask=batch.mask).logits
    soft = soft_target_loss(logits, wanted).item()
    assert loss["none", 0.2] == pytest.approx(task + 0.2 * soft, rel=1e-5)
    states = {}
    for name, model, places in (("s", student, (0, 1)), ("t", teacher, (0, 3))):
        x = model.transformer.wte(batch.ids) + model.transformer.wpe(torch.arange(8))
        states[name] = []
        for place, block in enumerate(model.transformer.h):
            x = block(x, attention_mask=_causal(batch.mask))
            states[name] += [x] if place in places else []
    hint = patient_loss(states["s"], states["t"], batch.mask).item()
    assert loss["patient", 0.2] == pytest.approx(task + 0.2 * (soft + hint), rel=1e-4)


def _causal(mask):
    n = mask.shape[1]
    return torch.ones(n, n, dtype=torch.bool).tril() & mask.bool()[:, None, None, :]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"hint": "mate"}, "'mate'.*none, patient, relations"),
        ({"weight": -0.1}, "-0.1"),
        ({"temperature": 0.0}, "temperature"),
        ({"blocks": [0]}, "2 places of 0 to 3"),
        ({"blocks": [0, 4]}, "2 places of 0 to 3"),
    ],
)
def test_options_of_a_classifier_are_checked(options, named):
    teacher = classifier_from(small(), 2)
    with pytest.raises(ValueError, match=named):
        DistilledClassifier(truncate(teacher, [0, 2]), teacher, ADAMW, num_classes=2, **options)


def test_relations_need_equal_heads():
    student, teacher = classifier_from(small(2, heads=2), 2), classifier_from(small(), 2)
    with pytest.raises(ValueError, match="got 2 and 3"):
        DistilledClassifier(student, teacher, ADAMW, num_classes=2, hint="relations")


# ---------------------------------------------------------------- learning curves


def test_a_curve_is_read_between_its_points():
    seconds, values = [1.0, 2.0, 4.0], [100.0, 10.0, 5.0]
    assert perplexity_at(seconds, values, 1.5) == pytest.approx(1000**0.5)
    assert [perplexity_at(seconds, values, at) for at in (0.5, 2.0, 9.0)] == pytest.approx([100.0, 10.0, 5.0])
    assert seconds_to(seconds, values, 1000**0.5) == pytest.approx(1.5)
    assert [seconds_to(seconds, values, target) for target in (200.0, 10.0, 4.9)] == [1.0, 2.0, None]


@given(st.lists(st.floats(1.01, 1e4), min_size=2, max_size=8), st.floats(0, 1))
def test_reading_time_undoes_reading_perplexity(values, share):
    falling = sorted(set(values), reverse=True)
    seconds = [float(i + 1) for i in range(len(falling))]
    at = 1 + share * (len(falling) - 1)
    found = seconds_to(seconds, falling, perplexity_at(seconds, falling, at) * (1 + 1e-12))
    again = perplexity_at(seconds, falling, found)
    assert again == pytest.approx(perplexity_at(seconds, falling, at), rel=1e-9)


def test_the_first_time_counts_where_a_curve_rises_again():
    assert seconds_to([1, 2, 3, 4], [9.0, 5.0, 8.0, 4.0], 5.0) == 2


@pytest.mark.parametrize(("seconds", "values"), [([], []), ([1.0], [1.0, 2.0]), ([1.0, 1.0], [2.0, 1.0])])
def test_curves_that_are_none_are_refused(seconds, values):
    for read in (perplexity_at, seconds_to):
        with pytest.raises(ValueError, match=r"expected|rise"):
            read(seconds, values, 1.0)


# ---------------------------------------------------------------- cleaning


def test_duplicates_go_and_the_first_one_stays_in_its_place():
    lines = ["b b b b b", "a a a a a", "b b b b b", "c", "a a a a a", "c"]
    assert clean_lines(lines) == ["b b b b b", "a a a a a", "c"]


def test_the_key_ignores_the_middle_and_counts_letters_without_punctuation():
    first = "one two three four MIDDLE five six seven eight"
    assert line_key(first) == line_key(first.replace("MIDDLE", "CENTRE"))
    assert line_key(first) != line_key(first.replace("MIDDLE", "MIDDLES"))
    assert line_key("one two three four x.y five six seven eight") == line_key(
        "one two three four xy five six seven eight"
    )
    assert line_key("words, four of them, here") != line_key("words four of them here"), "words keep their punctuation"
    assert clean_lines([first, first.replace("MIDDLE", "CENTRE")]) == [first]


@pytest.mark.parametrize(
    ("line", "tag"),
    [
        ("a <b>bold</b> word", True),
        ("an end </p>", True),
        ("a break<br/>", True),
        ("a < b and b > a", False),
        ("x <3 y", False),
        ("fish &amp; chips", False),
        ("an <unk> word", True),
        ("plain", False),
    ],
)
def test_what_the_parser_takes_for_a_tag(line, tag):
    assert has_tag(line) is tag
    assert clean_lines([line]) == ([] if tag else [line])


def test_marks_that_are_no_tags_are_spared_and_blank_lines_stay():
    lines = ["the <unk> cat", " \n", "the <unk> <b>dog</b>", " \n", ""]
    assert clean_lines(lines, no_tags=["<unk>"]) == ["the <unk> cat", " \n", " \n", ""]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text("ab <>/", max_size=12), max_size=20))
def test_cleaning_twice_is_cleaning_once_and_takes_lines_only_away(lines):
    once = clean_lines(lines)
    assert clean_lines(once) == once
    rest = iter(lines)
    assert all(any(line == other for other in rest) for line in once), "a subsequence"


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.floats(0, 2), st.floats(0, 2), st.integers(0, 99))
def test_what_is_soiled_comes_out_clean(count, duplicates, markup, seed):
    lines = [f"line number {i} of the clean text says {i * i} things\n" for i in range(count)]
    soiled = soil_lines(lines, duplicates=duplicates, markup=markup, seed=seed)
    assert len(soiled) == count + round(duplicates * count) + round(markup * count)
    assert sum(map(has_tag, soiled)) == round(markup * count)
    assert clean_lines(soiled) == lines
    assert soil_lines(lines, duplicates=duplicates, markup=markup, seed=seed) == soiled


def test_dirt_has_a_size():
    assert soil_lines(["a", "b"], duplicates=0, markup=0, seed=0) == ["a", "b"]
    for options in ({"duplicates": -0.1, "markup": 0}, {"duplicates": 0, "markup": math.nan}):
        with pytest.raises(ValueError, match="at least 0"):
            soil_lines(["a"], **options, seed=0)
