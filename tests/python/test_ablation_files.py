"""Studies as files: what is read, and the one sentence for everything that is written wrongly."""

from __future__ import annotations

import dataclasses
import time
import typing
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from torch_pnn.ablation import files, keys
from torch_pnn.ablation.errors import AblationError, UsageError
from torch_pnn.ablation.study import STREAMS, Arm, DataSettings, ModelSettings, Question, Schedule, Study

ROOT = Path(__file__).resolve().parents[2]
GOOD = "arms: [pnn, control]\nseeds: 2\n"


@pytest.fixture
def read(tmp_path, monkeypatch):
    """Writes a text (or bytes) as study.yaml, and reads it."""
    monkeypatch.chdir(tmp_path)

    def read(text, name="study.yaml", **options):
        (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
        return files.load(name, **options)

    return read


def test_the_smallest_study_has_the_defaults(read):
    study = read(GOOD)
    assert study.name == study.title == "study"
    assert study.arm_names == ("pnn", "control")
    assert study.seeds == (0, 1)
    assert study.data == DataSettings()
    assert study.model == ModelSettings()
    assert study.schedule == Schedule()
    assert study.question == Question()
    assert study.vary == STREAMS


def test_every_kind_of_value(read):
    study = read("""
name: all
title: 2018            # a number that stands for a text
data: {name: digits, train_images: 1_000, shifts: [1, 2], augment: yes}
model:
  network: lenet
  options: {a: 1e-4, b: 010x, c: "010", d: null, e: [1, 2.5, x], f: {g: true}, h: 1e3, i: .5}
arms:
  - pnn
  - control
  - {name: half, base: pnn, level: 5e-1}
  - base: waves
    title: Waves, loud
    options: {level: 1}
seeds: [3, 5, 7]
other_seeds: 2
schedule: {optimizer: adam, learning_rate: 1e-4, decay: steps, milestones: [3, 9], warmup_epochs: 0, weight_decay: 1E-2}
question: {margin: 1}
vary: [masks]
device: cuda:1
precision: bfloat16
""")
    assert study.title == "2018"
    assert study.data == DataSettings(train_images=1000, shifts=(1, 2), augment=True)
    assert study.model.options == {
        "a": 1e-4,
        "b": "010x",
        "c": "010",
        "d": None,
        "e": [1, 2.5, "x"],
        "f": {"g": True},
        "h": 1000.0,
        "i": 0.5,
    }
    half = study.arm("half")
    assert half.options == {"preset": "juefeix2018", "level": 0.5}
    assert (half.title, half.phrase, half.summary) == ("", "", "As PNN, with level 0.5.")
    assert study.arm("waves").title == "Waves, loud"
    assert study.arm("waves").options["level"] == 1.0
    assert study.arm("waves").options["noise"] == "waves"
    assert study.seeds == (3, 5, 7)
    assert study.other_seeds == (3, 5)
    assert study.schedule.milestones == (3, 9)
    assert study.schedule.learning_rate == 1e-4
    assert type(study.schedule.warmup_epochs) is float
    assert type(study.question.margin) is float
    assert study.vary == ("masks",)


BAD = [
    ("", "study.yaml: the file is empty; torch-pnn studies show digits prints a study to begin with"),
    ("# nothing\n", "study.yaml: the file is empty; torch-pnn studies show digits prints a study to begin with"),
    ("- pnn\n", "study.yaml:1: a list, where a study's keys are needed: name, title, arms"),
    ("pnn\n", 'study.yaml:1: "pnn", where a study\'s keys are needed: name, title, arms'),
    ("seeds: 2\n", "study.yaml:1: the study has no arms"),
    ("\narms: [pnn, control]\n", "study.yaml:2: the study has no seeds"),
    ("arms: []\nseeds: 2\n", "study.yaml:1: arms is an empty list, the candidate and the control at least are needed"),
    ("arms: pnn\nseeds: 2\n", 'study.yaml:1: arms is "pnn", a list is needed, such as [pnn, control]'),
    ("arms: [pnn, ctrl]\nseeds: 2\n", 'study.yaml:1: unknown arm "ctrl" (did you mean control?); there is: cnn, '),
    ("arms:\n  - pnn\n  - control\n  - pnn\nseeds: 2\n", 'study.yaml:4: the arm "pnn" stands twice'),
    ("arms: [pnn, waves]\nseeds: 2\n", 'study.yaml:1: question.control is "control", which is not among the arms: '),
    (GOOD + "epochs: 3\n", 'study.yaml:3: a study has no key "epochs"; there is: name, title, arms'),
    (GOOD + "shedule: {}\n", 'study.yaml:3: a study has no key "shedule" (did you mean schedule?); there is: '),
    (GOOD + "schedule:\n  epoch: 3\n", 'study.yaml:4: schedule has no key "epoch" (did you mean epochs?); there is: '),
    (GOOD + "schedule: 3\n", "study.yaml:3: schedule is 3, a mapping with keys is needed: epochs, batch_size"),
    (
        GOOD + "schedule:\n\n  epochs: many\n",
        'study.yaml:5: schedule.epochs is "many", a whole number from 1 is needed',
    ),
    (GOOD + "schedule: {epochs: 0}\n", "study.yaml:3: schedule.epochs is 0, a whole number from 1 is needed"),
    (GOOD + "schedule: {epochs: 1.5}\n", "study.yaml:3: schedule.epochs is 1.5, a whole number from 1 is needed"),
    (GOOD + "schedule: {epochs: 3.0}\n", "study.yaml:3: schedule.epochs is 3.0, a whole number from 1 is needed"),
    (GOOD + "schedule: {epochs: '3'}\n", 'study.yaml:3: schedule.epochs is "3" in quotes, a whole number from 1 is'),
    (GOOD + "schedule: {epochs: true}\n", "study.yaml:3: schedule.epochs is true, a whole number from 1 is needed"),
    (GOOD + "schedule: {epochs: }\n", "study.yaml:3: schedule.epochs is empty, a whole number from 1 is needed"),
    (GOOD + "schedule: {epochs: [3]}\n", "study.yaml:3: schedule.epochs is a list, a whole number from 1 is needed"),
    (GOOD + "schedule: {epochs: 010}\n", "study.yaml:3: schedule.epochs is 010, an octal number to YAML; write 10"),
    (GOOD + "schedule: {epochs: 1:30}\n", 'study.yaml:3: schedule.epochs is "1:30", a whole number from 1 is needed'),
    (GOOD + "schedule: {epochs: 0x10}\n", 'study.yaml:3: schedule.epochs is "0x10", a whole number from 1 is needed'),
    (GOOD + f"schedule: {{epochs: {'9' * 5000}}}\n", 'study.yaml:3: schedule.epochs is "9999999999999999999999'),
    (GOOD + "schedule: {learning_rate: 0}\n", "study.yaml:3: schedule.learning_rate is 0, a number above 0 is needed"),
    (GOOD + "schedule: {learning_rate: .inf}\n", 'study.yaml:3: schedule.learning_rate is ".inf", a number above 0'),
    (GOOD + "schedule: {learning_rate: 1e999}\n", "study.yaml:3: schedule.learning_rate is 1e999, a number above 0 is"),
    (GOOD + "schedule: {learning_rate: 1e-4x}\n", 'study.yaml:3: schedule.learning_rate is "1e-4x", a number above 0'),
    (GOOD + "schedule: {momentum: 1}\n", "study.yaml:3: schedule.momentum is 1, a number from 0 to below 1 is needed"),
    (GOOD + "schedule: {weight_decay: -1}\n", "study.yaml:3: schedule.weight_decay is -1, a number from 0 is needed"),
    (
        GOOD + "schedule: {optimizer: adm}\n",
        'study.yaml:3: schedule.optimizer is "adm", one of sgd, adam or adamw is needed (did you mean adam?)',
    ),
    (GOOD + "schedule: {decay: steps}\n", "study.yaml:3: schedule.decay is steps, which needs schedule.milestones"),
    (
        GOOD + "schedule: {decay: steps, milestones: [9, 3]}\n",
        "study.yaml:3: schedule.milestones do not rise",
    ),
    (GOOD + "schedule: {milestones: 3}\n", "study.yaml:3: schedule.milestones is 3, a list is needed, such as [1, 2]"),
    (GOOD + "schedule: {milestones: [3, 3]}\n", "study.yaml:3: schedule.milestones names 3 twice"),
    (GOOD + "schedule:\n  milestones:\n    - 3\n    - x\n", 'study.yaml:6: schedule.milestones is "x", a whole number'),
    (GOOD + "data: {name: digit}\n", 'study.yaml:3: data.name is "digit", one of digits'),
    (GOOD + "data: {augment: maybe}\n", 'study.yaml:3: data.augment is "maybe", true or false is needed'),
    (GOOD + "data: {augment: 1}\n", "study.yaml:3: data.augment is 1, true or false is needed"),
    (GOOD + "data: {shifts: [0]}\n", "study.yaml:3: data.shifts is 0, a whole number from 1 to 65536 is needed"),
    (
        GOOD + "data: {train_images: 10, validation_images: 10}\n",
        "study.yaml:3: data.validation_images is 10, fewer than data.train_images (10) are needed: they are held out",
    ),
    (GOOD + "model: {network: resnt}\n", 'study.yaml:3: model.network is "resnt", one of '),
    (GOOD + "model: {network: 'a:b c'}\n", 'study.yaml:3: model.network is "a:b c" in quotes, one of '),
    (GOOD + "model: {options: 3}\n", "study.yaml:3: model.options is 3, a mapping is needed, such as {level: 0.1}"),
    (GOOD + "model: {options: {a-b: 3}}\n", 'study.yaml:3: model.options has the key "a-b", a name of an argument is'),
    (GOOD + "model: {options: {a: off}}\n", "study.yaml:3: model.options.a is off, which YAML takes for false; write"),
    (GOOD + "model: {options: {a: 010}}\n", "study.yaml:3: model.options.a is 010, an octal number to YAML; write 10"),
    (GOOD + "model: {options: {a: .nan}}\n", "study.yaml:3: model.options.a is .nan, a finite number is needed"),
    (GOOD + "question: {margin: -0.5}\n", "study.yaml:3: question.margin is -0.5, a number from 0 is needed"),
    (
        GOOD + "question:\n  candidate: cnn\n",
        'study.yaml:4: question.candidate is "cnn", which is not among the arms: pnn, control',
    ),
    (
        GOOD + "question: {candidate: pnn, control: pnn}\n",
        "study.yaml:3: question.candidate and question.control are one arm",
    ),
    (GOOD + "vary: [mask]\n", 'study.yaml:3: vary is "mask", one of initialisation, masks, order or augmentation is'),
    (GOOD + "device: gpu\n", 'study.yaml:3: device is "gpu", one of cpu, cuda or "cuda:1" is needed'),
    (GOOD + "precision: float\n", 'study.yaml:3: precision is "float", one of float32, bfloat16 or float16 is needed'),
    (GOOD + "threads: 0\n", "study.yaml:3: threads is 0, a whole number from 1 to 1024 is needed"),
    (GOOD + "name: a/b\n", 'study.yaml:3: name is "a/b", a name without commas and slashes is needed'),
    (GOOD + "seeds: 3\n", 'study.yaml:3: "seeds" stands twice; it is also on line 2'),
    ("arms: [pnn, control]\nseeds: 0\n", "study.yaml:2: seeds is 0, a whole number from 1 to 100000, or a list of see"),
    ("arms: [pnn, control]\nseeds: []\n", "study.yaml:2: seeds is an empty list, one seed at least is needed"),
    ("arms: [pnn, control]\nseeds: [1, 1]\n", "study.yaml:2: seeds names 1 twice"),
    ("arms: [pnn, control]\nseeds: [-1]\n", "study.yaml:2: seeds is -1, a whole number from 0 to 9223372036854775807"),
    ("arms: [pnn, control]\nseeds: ten\n", 'study.yaml:2: seeds is "ten", a whole number from 1 to 100000, or a list'),
    (GOOD + "other_seeds: [1]\n", "study.yaml:3: other_seeds is no beginning of seeds; the other arms could not be"),
    ("arms: [pnn, control, {title: x}]\nseeds: 2\n", "study.yaml:1: arms[3] has no name"),
    ("arms: [pnn, control, {name: x, base: y}]\nseeds: 2\n", 'study.yaml:1: arms[3].base is "y", one of cnn, '),
    ("arms: [pnn, control, {name: x, levl: 1}]\nseeds: 2\n", 'study.yaml:1: arms[3] has no key "levl" (did you mean'),
    ("arms: [pnn, control, {name: x, level: a}]\nseeds: 2\n", 'study.yaml:1: arms[3].level is "a", a number is needed'),
    (
        "arms: [pnn, control, {name: x, masks: 64}]\nseeds: 2\n",
        "study.yaml:1: arms[3].masks says when masks change (fixed, redrawn, other or trained); masks per channel are "
        "options: {masks: 64}",
    ),
    ("arms: [pnn, control, {name: x, match: y}]\nseeds: 2\n", 'study.yaml:1: x.match is "y", an arm is needed'),
    ("arms: [pnn, control, {name: x, match: x}]\nseeds: 2\n", "study.yaml:1: the arm x has itself as its match"),
    (
        "arms: [pnn, control, {name: x, title: PNN}]\nseeds: 2\n",
        'study.yaml:1: the arms pnn and x have one title, "PNN"',
    ),
    ("arms: [pnn, control, [cnn]]\nseeds: 2\n", "study.yaml:1: arms[3] is a list, a mapping with keys is needed: name"),
    (GOOD + "sweeps: [pnn]\n", 'study.yaml:3: sweeps[1] is "pnn", a sweep is needed, such as {of: pnn, level: [0.1, 0'),
    (GOOD + "sweeps: [{of: pnn}]\n", "study.yaml:3: sweeps[1] needs two keys: of, and what is swept, such as {of: pnn"),
    (GOOD + "sweeps: [{of: pn, level: [1]}]\n", 'study.yaml:3: sweeps[1].of is "pn", one of pnn, control, '),
    (
        GOOD + "sweeps: [{of: pnn, level: []}]\n",
        "study.yaml:3: sweeps[1].level is an empty list, one value at least is",
    ),
    (GOOD + "sweeps: [{of: pnn, level: [1, 1]}]\n", "study.yaml:3: sweeps[1].level names a value twice"),
    (GOOD + "sweeps: [{of: pnn, level: [x]}]\n", 'study.yaml:3: sweeps[1].level is "x", a number is needed'),
    (GOOD + "quick: 3\n", "study.yaml:3: quick is 3, a mapping with keys of a study is needed"),
    (
        GOOD + "quick: {schedule: {epochs: x}}\n",
        'study.yaml:3: schedule.epochs is "x", a whole number from 1 is needed',
    ),
    (GOOD + "extends: digit\n", 'study.yaml:3: extends is "digit", one of digits, '),
    (
        GOOD + "extends: other.yaml\n",
        'study.yaml:3: extends is "other.yaml", and there is no such file beside this one',
    ),
    (GOOD + "extends: study.yaml\n", 'study.yaml:3: extends is "study.yaml": the files extend one another in a circle'),
    (GOOD + "extends:\n", "study.yaml:3: extends is empty, a ready-made study's name or a file's is needed"),
    # What YAML itself refuses, or should.
    ("arms: [pnn\nseeds: 2\n", "study.yaml:2: not YAML: expected ',' or ']', but got ':' (column 6)"),
    (GOOD + "title: a: b\n", 'study.yaml:3: not YAML: a ": " too much, or a key that is indented too far; a text with'),
    (GOOD + "schedule:\n\tepochs: 3\n", "study.yaml:4: a tab, where YAML wants blanks; indent with blanks"),
    (GOOD + "title: *x\n", "study.yaml:3: not YAML: there is no anchor 'x'"),
    (GOOD + "---\nseeds: 3\n", "study.yaml:3: a second document begins here; a study is one document"),
    (
        GOOD + "title: !!python/object:os.system x\n",
        "study.yaml:3: the tag !!python/object:os.system has no meaning in a",
    ),
    (GOOD + "title: !mine x\n", "study.yaml:3: the tag !mine has no meaning in a study; leave it out"),
    (GOOD + "[1]: 3\n", "study.yaml:3: a key is a word, not a list or a mapping"),
    (GOOD + "<<: 3\n", "study.yaml:3: << takes a mapping, or a list of mappings"),
    (GOOD + "model: &a {options: {b: *a}}\n", "study.yaml:3: the anchor stands inside itself"),
    ((GOOD + "title: \0\n"), "study.yaml:3: the character U+0000 can't stand in YAML"),
    (GOOD.encode() + b"title: \xff\n", "study.yaml:3: the byte 0xff is not UTF-8; save the file as UTF-8"),
    ("\N{BYTE ORDER MARK}" + GOOD + "title: 'x\n", "study.yaml:"),
    (GOOD.encode("utf-16"), "study.yaml: UTF-16 text; save it as UTF-8"),
    ("x" * 300_000, "study.yaml: larger than 256 KiB; that is no study"),
    (GOOD + "title: " + "[" * 5000 + "\n", "study.yaml: nested too deeply for a study"),
]


@pytest.mark.parametrize("text, sentence", BAD, ids=range(len(BAD)))
def test_what_is_wrong_is_said_in_one_sentence(read, text, sentence):
    with pytest.raises(UsageError) as refused:
        read(text)
    said = str(refused.value)
    assert said.startswith(sentence)
    assert "\n" not in said
    assert len(said) < 1000


def test_a_billion_aliases_are_refused_at_once(read):
    bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n"
    bomb += "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 10))
    started = time.monotonic()
    with pytest.raises(UsageError, match=r"study.yaml:\d+: its aliases stand for more than 100000 values"):
        read(bomb)
    assert time.monotonic() - started < 20


def test_files_that_are_not_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.yaml").mkdir()
    (tmp_path / "mine").write_text(GOOD)
    for name, kind, words in (
        ("none.yaml", UsageError, "none.yaml: there is no such file"),
        ("folder.yaml", AblationError, "can't read folder.yaml: is a directory"),
        ("digit", UsageError, "unknown study 'digit' (did you mean digits?); there is: digits, "),
        ("mine", UsageError, "study 'mine' is a file without the ending .yaml; give it one"),
    ):
        with pytest.raises(kind) as refused:
            files.load(name)
        assert str(refused.value).startswith(words)


def test_anchors_and_merge_keys(read):
    study = read("""
schedule: &fast {epochs: 3, learning_rate: 0.2}
arms:
  - &loud {name: loud, base: pnn, level: 1}
  - pnn
  - control
  - {<<: *loud, name: louder, level: 2}
seeds: 2
quick: {schedule: {<<: *fast, epochs: 1}}
""")
    assert study.schedule.epochs == 3
    assert study.arm("louder").options == {"preset": "juefeix2018", "level": 2.0}


def test_a_study_that_builds_on_another(read):
    read("extends: digits\nschedule: {epochs: 3}\nseeds: 4\n", name="middle.yaml")
    study = read("extends: middle.yaml\nname: top\narms: [pnn, control]\nschedule: {batch_size: 7}\n")
    digits = files.load("digits")
    assert study.name == "top"
    assert study.title == digits.title
    assert study.arm_names == ("pnn", "control")
    assert study.schedule == dataclasses.replace(digits.schedule, epochs=3, batch_size=7)
    assert study.seeds == (0, 1, 2, 3)
    assert files.load("middle.yaml").name == "middle"
    # A mistake in the lower file is said with the lower file's name and line.
    with pytest.raises(UsageError, match=r"^lower.yaml:3: threads is 0"):
        read("extends: digits\nseeds: 3\nthreads: 0\n", name="lower.yaml")
    with pytest.raises(UsageError, match=r"^lower.yaml:3: threads is 0"):
        read("extends: lower.yaml\n")


def test_quick(read):
    text = GOOD.replace("2", "9") + "schedule: {epochs: 30, learning_rate: 0.2}\nother_seeds: 7\n"
    study = read(text, quick=True)
    assert (study.seeds, study.other_seeds, study.schedule.epochs) == ((0, 1, 2), (), 2)
    assert study.schedule.learning_rate == 0.2
    assert study.schedule.warmup_epochs == 1
    assert study.data.train_images == 1000
    chosen = read(text + "quick: {seeds: 4, schedule: {epochs: 5}}\n", quick=True)
    assert (chosen.seeds, chosen.other_seeds, chosen.schedule.epochs) == ((0, 1, 2, 3), (), 5)
    assert chosen.schedule.learning_rate == 0.2
    assert chosen.data.train_images == 0
    # What is set on the command line stands over both.
    assert read(text, quick=True, settings=["seeds=5"]).schedule.epochs == 2
    assert read(text + "quick: {seeds: 4}\n", quick=True, settings=["seeds=5"]).seeds == (0, 1, 2, 3, 4)


def test_settings_of_the_command_line():
    study = files.load(
        "digits",
        settings=[
            "schedule.epochs=3",
            "schedule.learning_rate=1e-3",
            "seeds=5,6,7",
            "data.shifts=1,2",
            "arms=pnn,control,waves",
            "arms.waves.level=0.5",
            "arms.pnn.options.masks=2",
            "model.options={stem_stride: 2}",
            "title='a = b: c, d'",
            "schedule.epochs=4",
        ],
    )
    assert study.schedule.epochs == 4
    assert study.schedule.learning_rate == 1e-3
    assert study.seeds == (5, 6, 7)
    assert study.data.shifts == (1, 2)
    assert study.arm("waves").options["level"] == 0.5
    assert study.arm("pnn").options == {"preset": "juefeix2018", "masks": 2}
    assert study.model.options == {"stem_stride": 2}
    assert study.title == "a = b: c, d"


@pytest.mark.parametrize(
    "setting, sentence",
    [
        ("seeds", "--set seeds: key=value is needed, such as schedule.epochs=3"),
        ("=3", "--set =3: key=value is needed, such as schedule.epochs=3"),
        (
            "seeds=many",
            '--set seeds=many: seeds is "many", a whole number from 1 to 100000, or a list of seeds, is need',
        ),
        ("epochs=3", '--set epochs=3: a study has no key "epochs"; there is: '),
        ("schedule.epoch=3", '--set schedule.epoch=3: schedule has no key "epoch" (did you mean epochs?); there is: '),
        ("schedule.epochs.x=3", "--set schedule.epochs.x=3: there is nothing below schedule.epochs"),
        ("schedule.epochs=", "--set schedule.epochs=: schedule.epochs is empty, a whole number from 1 is needed"),
        ("threads=[", "--set threads=[: not YAML: expected the node content, but found '<stream end>' (column 2)"),
        ("threads=!x 1", "--set threads=!x 1: the tag !x has no meaning in a study; leave it out"),
        ("arms.pn.level=1", "--set arms.pn.level=1: pn is no arm of the study (did you mean pnn?); there is: cnn, "),
        ("arms.pnn=1", "--set arms.pnn=1: arms.pnn is an arm, one of its keys is needed, such as arms.pnn.level"),
        ("arms.pnn.level=x", '--set arms.pnn.level=x: arms[4].level is "x", a number is needed'),
        ("extends=mnist", "--set extends=mnist: extends stands in a file alone"),
        ("quick={}", "--set quick={}: quick stands in a file alone"),
        ("arms=pnn", "digits.yaml:"),
    ],
)
def test_a_wrong_setting_names_the_option(setting, sentence):
    with pytest.raises(UsageError) as refused:
        files.load("digits", settings=[setting])
    assert str(refused.value).startswith(sentence)


# Text without surrogates; YAML keeps no other control characters than these.
TEXTS = st.text(
    st.characters(exclude_categories=["Cs", "Cc"], include_characters="\n\t"), max_size=12
) | st.sampled_from(
    [
        "on",
        "no",
        "~",
        "null",
        "1e-4",
        "010",
        "12",
        "1:30",
        "2018-06-01",
        "<<",
        "a: b",
        "- a",
        "#",
        " x ",
        "'",
        '"',
        "é",
        "x\ny\n",
    ]
)
NAMES = st.from_regex(r"[a-z][a-z0-9 ._:#'-]{0,8}[a-z]", fullmatch=True)
FLOATS = st.floats(allow_nan=False, allow_infinity=False)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | FLOATS | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=5,
)
IDENTIFIERS = st.from_regex(r"[a-z_][a-z0-9_]{0,6}", fullmatch=True).filter(lambda name: name not in files.OPTIONS)
OPTIONS = st.dictionaries(IDENTIFIERS, VALUES, max_size=3)
POSITIVE = st.floats(min_value=1e-300, max_value=1e300)


@st.composite
def studies(draw):
    names = draw(st.lists(NAMES, min_size=2, max_size=5, unique=True))
    titles = draw(st.lists(TEXTS.filter(bool), min_size=len(names), max_size=len(names), unique=True))
    arms = tuple(
        Arm(
            name,
            title=title,
            summary=draw(TEXTS),
            layer=draw(st.sampled_from(["perturb", "conv"])),
            options=draw(OPTIONS),
            masks=draw(st.sampled_from(["fixed", "redrawn", "other", "trained"])),
            match=draw(st.sampled_from(["", *(other for other in names if other != name)])),
            match_by=draw(st.sampled_from(["parameters", "macs"])),
            phrase=draw(TEXTS),
            group=draw(TEXTS),
            value=draw(st.none() | FLOATS | st.integers(0, 99) | NAMES),
        )
        for name, title in zip(names, titles)
    )
    seeds = tuple(draw(st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=5, unique=True)))
    first = draw(st.integers(1, 9))
    seeds = draw(st.sampled_from([seeds, tuple(range(first))]))
    milestones = tuple(sorted(draw(st.sets(st.integers(1, 99), max_size=3))))
    return Study(
        name=draw(NAMES),
        title=draw(TEXTS.filter(bool)),
        notes=draw(TEXTS),
        arms=arms,
        seeds=seeds,
        other_seeds=seeds[: draw(st.integers(0, len(seeds)))],
        data=DataSettings(
            root=draw(TEXTS),
            train_images=draw(st.integers(1000, 2000)),
            validation_images=draw(st.integers(0, 99)),
            augment=draw(st.booleans()),
            shifts=tuple(draw(st.sets(st.integers(1, 99), max_size=3))),
        ),
        model=ModelSettings(network=draw(st.sampled_from(["resnet", "lenet", "my.models:net"])), options=draw(OPTIONS)),
        schedule=Schedule(
            epochs=draw(st.integers(1, 99)),
            learning_rate=draw(POSITIVE),
            decay=draw(st.sampled_from(["cosine", "constant"] + ["steps"] * bool(milestones))),
            milestones=milestones,
            warmup_epochs=draw(st.floats(0, 9)),
            weight_decay=draw(st.floats(0, 1)),
        ),
        question=Question(names[0], names[1], draw(st.floats(0, 9))),
        vary=tuple(draw(st.lists(st.sampled_from(STREAMS), unique=True))),
        device=draw(st.sampled_from(["cpu", "cuda", "cuda:3"])),
    )


@given(studies())
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
def test_what_is_written_is_read_as_the_same_study(tmp_path, study):
    path = tmp_path / "written.yaml"
    path.write_text(files.dump(study), encoding="utf-8", newline="")
    again = files.load(str(path))
    assert again == study
    assert again.fingerprint() == study.fingerprint()


@pytest.mark.parametrize("name", files.ready_names())
def test_every_ready_made_study_is_written_and_read_as_itself(name, tmp_path):
    study = files.load(name)
    assert study.name == name
    (tmp_path / "copy.yaml").write_text(files.dump(study), encoding="utf-8")
    assert files.load(str(tmp_path / "copy.yaml")) == study
    # A copy of the file itself is the same study too, wherever it lies.
    (tmp_path / f"{name}.yaml").write_text(files.text_of(name), encoding="utf-8")
    assert files.load(str(tmp_path / f"{name}.yaml")) == study
    head = files.text_of(name).splitlines()
    assert head[0].startswith("# ")
    comment = "\n".join(line for line in head if line.startswith("#"))
    for word in ("# Asks: ", "# From: ", "# Takes:"):
        assert word in comment


def test_digits_is_the_study_of_the_first_release():
    study = files.load("digits")
    assert study.arm_names == ("cnn", "cnn-params", "lbcnn", "pnn", "control", "waves")
    assert study.seeds == tuple(range(10))
    assert study.schedule == Schedule()
    assert study.model == ModelSettings()
    quick = files.load("digits", quick=True)
    assert (quick.seeds, quick.schedule.epochs, quick.schedule.warmup_epochs) == ((0, 1, 2), 6, 1.0)


def test_the_documentation_tells_every_key():
    page = (ROOT / "docs" / "studies" / "README.md").read_text(encoding="utf-8")
    begin, end = "<!-- keys: made by torch-pnn studies keys -->\n", "<!-- end of keys -->"
    assert page.split(begin)[1].split(end)[0].strip() == keys.reference().strip(), (
        "run: torch-pnn studies keys, and put it into docs/studies/README.md"
    )
    for name in files.ready_names():
        assert f"`{name}`" in page


@pytest.mark.parametrize("owner", [Study, DataSettings, ModelSettings, Arm, Schedule, Question])
def test_every_number_has_a_range_and_every_key_a_meaning(owner):
    meanings = dict(keys.attributes(owner))
    hints = typing.get_type_hints(owner)
    for field in dataclasses.fields(owner):
        assert meanings.get(field.name), field.name
        hint = hints[field.name]
        if hint in (int, float) or hint == tuple[int, ...]:
            assert field.name in ("seeds", "other_seeds") or f"{owner.__name__}.{field.name}" in keys.RULES, field.name
    assert meanings.keys() == {field.name for field in dataclasses.fields(owner)}


def test_the_pages_example_is_a_study(read):
    page = (ROOT / "docs" / "studies" / "README.md").read_text(encoding="utf-8")
    study = read(page.split("```yaml\n")[1].split("```")[0], name="mine.yaml")
    assert study.schedule.epochs == 6
    assert study.arm("loud").options["level"] == 1
    assert [arm.value for arm in study.arms if arm.group == "level"] == [0.02, 0.5, 2.0]
