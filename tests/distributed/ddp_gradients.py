"""Gradients of a chapter's dry run at `paper`, from two processes and from one: `python ddp_gradients.py OUTPUT`.

Runs the cells of notebooks/skipvit.ipynb that make its data and its full-size network, takes one step with Lightning's
DDP on two processes (Lightning starts the second one as this same script), one stand-in image each, and writes the
averaged gradients beside those of plain PyTorch on the joint batch and on one image alone.
"""

import json
import sys

import lightning as L
import torch
from torch.utils.data import DataLoader, TensorDataset

from leantrain import paths
from leantrain.catalog import load_catalog
from leantrain.records import profile_parameters

PROCESSES = 2


class Keep(L.Callback):
    """Keeps the gradients that the optimiser is about to use."""

    def on_before_optimizer_step(self, trainer, module, optimizer):
        self.gradients = gradients_of(module)


def gradients_of(module):
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def chapter_names():
    """What the notebook's cells define up to its classifier, at `paper` with the dry run's settings."""
    notebook = json.loads((paths.NOTEBOOKS / "skipvit.ipynb").read_text(encoding="utf-8"))
    sources = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    marks = ("Chapter(", "data = images(", "def classifier(")
    wanted = [next(source for source in sources if mark in source) for mark in marks]
    names = profile_parameters(load_catalog().paper("skipvit"), "paper", {"dry_run": True})
    for source in wanted:
        exec(compile(source, "skipvit.ipynb", "exec"), names)
    return names


def loss_of(module, images, classes):
    return torch.nn.functional.cross_entropy(module(images), classes, label_smoothing=module.label_smoothing)


def plain(module, images, classes):
    """Gradients without Lightning and without DDP: of all weights, and of the last layer's on the first image alone."""
    (alone,) = torch.autograd.grad(loss_of(module, images[:1], classes[:1]), [module.model.head.weight])
    loss_of(module, images, classes).backward()
    return gradients_of(module), alone


def main(output):
    chapter = chapter_names()

    def module():
        L.seed_everything(chapter["seeds"][0], verbose=False)
        return chapter["classifier"]("SkipViT", chapter["learning_rates"][0], chapter["seeds"][0])

    images, classes = (rows[:PROCESSES] for rows in next(iter(chapter["data"].val_dataloader())))
    images = images.double()
    keep = Keep()
    trainer = L.Trainer(
        accelerator="cpu", devices=PROCESSES, strategy="ddp", precision="64-true", max_steps=1, callbacks=[keep],
        limit_val_batches=0, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module(), DataLoader(TensorDataset(images, classes), batch_size=1))
    if trainer.global_rank == 0:
        joint, alone = plain(module().double(), images, classes)
        found = {"processes": trainer.world_size, "averaged": keep.gradients, "joint": joint, "alone": alone}
        torch.save(found, output)


if __name__ == "__main__":
    main(sys.argv[1])
