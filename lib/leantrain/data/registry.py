"""What is known about every data set: its files and their checksums, where they come from, and their terms."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from types import MappingProxyType
from typing import Literal

__all__ = ["DATASETS", "DataSet", "File", "Source", "dataset"]


@dataclass(frozen=True)
class File:
    """One file as it must lie on the disk.

    Attributes:
        sha256: Its SHA-256, 64 lower-case hexadecimal digits.
        bytes: Its exact size.
    """

    sha256: str
    bytes: int


@dataclass(frozen=True)
class Source:
    """One download, and which files of the set it holds.

    Attributes:
        urls: The canonical address, then its mirrors; all serve the same bytes. Always https.
        sha256: SHA-256 of the download, or None if nobody published it (then only the unpacked files are checked).
        bytes: Size of the download if it is known.
        members: Name inside the download -> path below the data folder. The name is empty for the two kinds that
            hold one file.
        kind: `file` is used as it is, `gz` holds one packed file, `tar.gz` and `zip` hold members by name.
    """

    urls: tuple[str, ...]
    sha256: str | None
    bytes: int | None
    members: Mapping[str, str]
    kind: Literal["file", "gz", "tar.gz", "zip"]


@dataclass(frozen=True)
class DataSet:
    """One data set.

    Attributes:
        name: The name that chapters use.
        title: Its name in prose.
        kind: `embedded` comes with a library, `download` can be fetched, `manual` must be laid down by the reader.
        files: Path below the data folder -> what must be there. Empty unless the set can be downloaded.
        sources: Downloads that give the files.
        arrays: Name of an embedded array -> SHA-256 of its bytes.
        folders: For a manual set, the folders that must be there.
        trees: For a manual set of which every copy is the same, folder -> SHA-256 over the names and contents of its
            files, see :func:`leantrain.data.detection_sets.tree_sha256`.
        home: The authors' page.
        terms: On what terms it may be used, in a sentence or two.
        citation: What to cite.
    """

    name: str
    title: str
    kind: Literal["embedded", "download", "manual"]
    home: str
    terms: str
    citation: str
    files: Mapping[str, File] = field(default_factory=dict)
    sources: tuple[Source, ...] = ()
    arrays: Mapping[str, str] = field(default_factory=dict)
    folders: tuple[str, ...] = ()
    trees: Mapping[str, str] = field(default_factory=dict)

    @property
    def slug(self) -> str:
        """The name as a file name."""
        return self.name.replace("/", "-")

    @property
    def card(self) -> PurePosixPath:
        """The set's data card, relative to the project's root."""
        return PurePosixPath("data/cards") / f"{self.slug}.md"

    @property
    def bytes(self) -> int:
        """Size of all files on the disk."""
        return sum(file.bytes for file in self.files.values())

    @property
    def checksums(self) -> dict[str, str]:
        """File, array or folder -> SHA-256, as the provenance of a chapter records it."""
        return {path: file.sha256 for path, file in self.files.items()} | {**self.arrays, **self.trees}


def _glue(
    task: str, title: str, terms: str, citation: str, archive: tuple[str, int | None], train: File, dev: File
) -> DataSet:
    folder = f"glue/{task}"
    files = {f"{folder}/train.tsv": train, f"{folder}/dev.tsv": dev}
    return DataSet(
        name=f"glue/{task.lower().replace('-', '')}",
        title=title,
        kind="download",
        home="https://gluebenchmark.com/tasks",
        terms=terms,
        citation=f"{citation} As part of GLUE: A. Wang et al., ICLR 2019.",
        files=files,
        sources=(
            Source(
                urls=(f"https://dl.fbaipublicfiles.com/glue/data/{task}.zip",),
                sha256=archive[0],
                bytes=archive[1],
                members={path.removeprefix("glue/"): path for path in files},
                kind="zip",
            ),
        ),
    )


_CIFAR10_FILES = {
    "cifar-10-batches-py/batches.meta": File("f962466ef690d46b226450fb9aadc74ba4bc64a76aa526b5827fe4bc5c7125cb", 158),
    "cifar-10-batches-py/data_batch_1": File(
        "54636561a3ce25bd3e19253c6b0d8538147b0ae398331ac4a2d86c6d987368cd", 31035704
    ),
    "cifar-10-batches-py/data_batch_2": File(
        "766b2cef9fbc745cf056b3152224f7cf77163b330ea9a15f9392beb8b89bc5a8", 31035320
    ),
    "cifar-10-batches-py/data_batch_3": File(
        "0f00d98ebfb30b3ec0ad19f9756dc2630b89003e10525f5e148445e82aa6a1f9", 31035999
    ),
    "cifar-10-batches-py/data_batch_4": File(
        "3f7bb240661948b8f4d53e36ec720d8306f5668bd0071dcb4e6c947f78e9682b", 31035696
    ),
    "cifar-10-batches-py/data_batch_5": File(
        "d91802434d8376bbaeeadf58a737e3a1b12ac839077e931237e0dcd43adcb154", 31035623
    ),
    "cifar-10-batches-py/test_batch": File(
        "f53d8d457504f7cff4ea9e021afcf0e0ad8e24a91f3fc42091b8adef61157831", 31035526
    ),
}

# Name of the idx file -> the unpacked file, and the packed download (SHA-256, bytes).
_MNIST = {
    "train-images-idx3-ubyte": (
        File("ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db", 47040016),
        ("440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609", 9912422),
    ),
    "train-labels-idx1-ubyte": (
        File("65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5", 60008),
        ("3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c", 28881),
    ),
    "t10k-images-idx3-ubyte": (
        File("0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7", 7840016),
        ("8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6", 1648877),
    ),
    "t10k-labels-idx1-ubyte": (
        File("ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2", 10008),
        ("f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6", 4542),
    ),
}

_WIKITEXT2 = {
    "train": File("9e9fa1ad55b1c2c95b08e37dd8e653f638fac2c6de904b79e813611eefbc985f", 10797148),
    "valid": File("f0737ed31fc1329026e95cb8b98e19c2a182c39c240ab909dc31abf2f8af58e8", 1121681),
    "test": File("d790b833ef8cf03a90db7bf1271b7520b83c45ce07ba3c1a9699df81e239eca0", 1256449),
}
_WIKITEXT2_URL = (
    "https://raw.githubusercontent.com/pytorch/examples/77f55b912142e11fcfdf5b530231fb9c52f181e8"
    "/word_language_model/data/wikitext-2"
)

_SHAKESPEARE = File("86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed", 1115394)

_ALL = (
    DataSet(
        name="digits",
        title="Digits (scikit-learn)",
        kind="embedded",
        home="https://archive.ics.uci.edu/dataset/80/optical+recognition+of+handwritten+digits",
        terms="Part of scikit-learn (BSD 3-clause); the UCI repository distributes the original under CC BY 4.0.",
        citation=(
            "E. Alpaydin, C. Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning Repository, 1998."
        ),
        arrays={
            "sklearn.datasets.load_digits images, uint8": (
                "8f26b2bd9d135c256808f68f14fdabddde6d9c7f869ae419704b051f0f14b3b3"
            ),
            "sklearn.datasets.load_digits target, int64": (
                "a3c91c262eddcf7ba8f0e37507c30284493c9b20412ffe4af30d536401f7ba21"
            ),
        },
    ),
    DataSet(
        name="docstrings",
        title="Docstrings (scikit-learn)",
        kind="embedded",
        home="https://scikit-learn.org/stable/api/index.html",
        terms="Part of scikit-learn (BSD 3-clause).",
        citation="F. Pedregosa et al., Scikit-learn: Machine Learning in Python, JMLR 12, 2011.",
        arrays={
            "docstrings of sklearn, utf-8": "1cd8afa9fdfedb162905596e572277a45815fe4d3a984a11c3c600243bb3e326",
        },
    ),
    DataSet(
        name="cifar10",
        title="CIFAR-10",
        kind="download",
        home="https://www.cs.toronto.edu/~kriz/cifar.html",
        terms="The authors state no licence; they ask that the technical report be cited.",
        citation=(
            "A. Krizhevsky, Learning Multiple Layers of Features from Tiny Images, technical report, "
            "University of Toronto, 2009."
        ),
        files=_CIFAR10_FILES,
        sources=(
            Source(
                urls=("https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",),
                sha256="6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce",
                bytes=170498071,
                members={path: path for path in _CIFAR10_FILES},
                kind="tar.gz",
            ),
        ),
    ),
    DataSet(
        name="mnist",
        title="MNIST",
        kind="download",
        home="http://yann.lecun.com/exdb/mnist/",
        terms="The authors state no licence; the database is commonly passed on under CC BY-SA 3.0.",
        citation=(
            "Y. LeCun, L. Bottou, Y. Bengio, P. Haffner, Gradient-Based Learning Applied to Document Recognition, "
            "Proceedings of the IEEE 86(11), 1998."
        ),
        files={f"MNIST/raw/{name}": file for name, (file, _) in _MNIST.items()},
        sources=tuple(
            Source(
                urls=(
                    f"https://ossci-datasets.s3.amazonaws.com/mnist/{name}.gz",
                    f"https://storage.googleapis.com/cvdf-datasets/mnist/{name}.gz",
                ),
                sha256=packed[0],
                bytes=packed[1],
                members={"": f"MNIST/raw/{name}"},
                kind="gz",
            )
            for name, (_, packed) in _MNIST.items()
        ),
    ),
    DataSet(
        name="imagenet",
        title="ImageNet (ILSVRC 2012)",
        kind="manual",
        home="https://www.image-net.org/download.php",
        terms=(
            "For non-commercial research and education only; everyone must agree to the terms of access in person. "
            "The pictures belong to their photographers."
        ),
        citation="O. Russakovsky et al., ImageNet Large Scale Visual Recognition Challenge, IJCV 115, 2015.",
        folders=("imagenet/train", "imagenet/val"),
    ),
    DataSet(
        name="ucf101",
        title="UCF-101",
        kind="manual",
        home="https://www.crcv.ucf.edu/data/UCF101.php",
        terms=(
            "The authors state no licence; the clips come from YouTube and belong to who made them. "
            "For research and teaching."
        ),
        citation=(
            "K. Soomro, A. R. Zamir, M. Shah, UCF101: A Dataset of 101 Human Actions Classes From Videos in The Wild, "
            "CRCV-TR-12-01, 2012 (arXiv:1212.0402)."
        ),
        folders=("ucf101/frames",),
    ),
    DataSet(
        name="bccd",
        title="BCCD (blood cells)",
        kind="manual",
        home="https://github.com/Shenggan/BCCD_Dataset",
        terms="MIT licence, © 2017 shenggan; pictures and first annotations by cosmicad and akshaylamba.",
        citation="S. Gan and others, BCCD Dataset, https://github.com/Shenggan/BCCD_Dataset, 2017.",
        folders=("BCCD/Annotations", "BCCD/ImageSets/Main", "BCCD/JPEGImages"),
        trees={
            "BCCD/Annotations": "014ce8749bcc6a54ba6197e5c3259fd5a867c13e8de700898a2e6056d95e0901",
            "BCCD/ImageSets/Main": "5e2a58d79305ed7cc093ffd79429786baed1c6ce0107538d2d0b48eda83a0195",
            "BCCD/JPEGImages": "ab73ed237b5367bf5f8e6a81753d23c16469e375c88b66fc25f4d705a79c1a2a",
        },
    ),
    DataSet(
        name="voc",
        title="Pascal VOC 2007 and 2012",
        kind="manual",
        home="http://host.robots.ox.ac.uk/pascal/VOC/",
        terms=(
            "The pictures come from flickr, under flickr's terms of use, and belong to their photographers. "
            "For research and teaching."
        ),
        citation=(
            "M. Everingham, L. Van Gool, C. K. I. Williams, J. Winn, A. Zisserman, The Pascal Visual Object Classes "
            "(VOC) Challenge, IJCV 88, 2010."
        ),
        folders=tuple(
            f"VOCdevkit/VOC{year}/{part}"
            for year in (2007, 2012)
            for part in ("Annotations", "ImageSets/Main", "JPEGImages")
        ),
    ),
    DataSet(
        name="wikitext-2",
        title="WikiText-2",
        kind="download",
        home="https://github.com/pytorch/examples/tree/main/word_language_model",
        terms="Creative Commons Attribution-ShareAlike.",
        citation=(
            "S. Merity, C. Xiong, J. Bradbury, R. Socher, Pointer Sentinel Mixture Models, ICLR 2017 "
            "(arXiv:1609.07843)."
        ),
        files={f"wikitext-2/wiki.{split}.tokens": file for split, file in _WIKITEXT2.items()},
        sources=tuple(
            Source(
                urls=(f"{_WIKITEXT2_URL}/{split}.txt",),
                sha256=file.sha256,
                bytes=file.bytes,
                members={"": f"wikitext-2/wiki.{split}.tokens"},
                kind="file",
            )
            for split, file in _WIKITEXT2.items()
        ),
    ),
    DataSet(
        name="tinyshakespeare",
        title="tiny Shakespeare",
        kind="download",
        home="https://github.com/karpathy/char-rnn",
        terms="Shakespeare's text is in the public domain; the repository that collects it is under the MIT licence.",
        citation="A. Karpathy, The Unreasonable Effectiveness of Recurrent Neural Networks, 2015.",
        files={"tinyshakespeare/input.txt": _SHAKESPEARE},
        sources=(
            Source(
                urls=(
                    "https://raw.githubusercontent.com/karpathy/char-rnn/6f9487a6fe5b420b7ca9afb0d7c078e37c1d1b4e"
                    "/data/tinyshakespeare/input.txt",
                ),
                sha256=_SHAKESPEARE.sha256,
                bytes=_SHAKESPEARE.bytes,
                members={"": "tinyshakespeare/input.txt"},
                kind="file",
            ),
        ),
    ),
    _glue(
        "SST-2",
        "GLUE SST-2",
        "The Stanford Sentiment Treebank asks to be cited and states no licence. Use for research and teaching.",
        "R. Socher et al., Recursive Deep Models for Semantic Compositionality Over a Sentiment Treebank, EMNLP 2013.",
        ("d67e16fb55739c1b32cdce9877596db1c127dc322d93c082281f64057c16deaa", 7439277),
        train=File("48eac26399f8456935f81dd9e3a745c1430adb6c62e233ccfe22db4a0d15d1d1", 3806081),
        dev=File("54a9c12c77e402fc14d6a66a506f24d999f596b0176eb777c972cccc2f9cc4b0", 94931),
    ),
    _glue(
        "CoLA",
        "GLUE CoLA",
        "Sentences from published works on linguistics; no open licence is stated. Use for research and teaching.",
        "A. Warstadt, A. Singh, S. R. Bowman, Neural Network Acceptability Judgments, TACL 7, 2019.",
        ("f212fcd832b8f7b435fb991f101abf89f96b933ab400603bf198960dfc32cbff", 376971),
        train=File("cb368ebeb9f27d7ad03720d27ddc95687a311bdb100781a2fe59a5f5b1bc0624", 428590),
        dev=File("8c013e21dc39957cac37378d87bebe225b694a0d5fe13eded66c2856628833fd", 53717),
    ),
    _glue(
        "RTE",
        "GLUE RTE",
        "From the PASCAL challenges on recognising textual entailment; no single licence is stated. "
        "Use for research and teaching.",
        "I. Dagan et al. 2006; R. Bar-Haim et al. 2006; D. Giampiccolo et al. 2007; L. Bentivogli et al. 2009.",
        ("6bf86de103ecd335f3441bd43574d23fef87ecc695977a63b82d5efb206556ee", None),
        train=File("41e3a9b063433392343fad9e962cf2f58b681c78d8f71592f4186f0837246c5c", 846226),
        dev=File("80230dfa1347282e7b532b06a1004a76a710087541189bf874223ddf0e3819fb", 90343),
    ),
)

#: Every set by its name.
DATASETS: Mapping[str, DataSet] = MappingProxyType({one.name: one for one in _ALL})


def dataset(name: str) -> DataSet:
    """The set of a name.

    Raises:
        ValueError: If there is none.
    """
    if name not in DATASETS:
        raise ValueError(f"unknown data set {name!r}; the sets are {', '.join(sorted(DATASETS))}")
    return DATASETS[name]
