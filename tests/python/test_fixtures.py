"""Files that earlier versions saved load and give the bits that they gave then."""

import shutil

import pytest
import torch
from fixtures_support import FILES, FOLDER, filled, network, outputs, write

from torch_pnn import _library

VERSIONS = sorted(folder.name for folder in FOLDER.iterdir() if folder.is_dir())
COMPILED = _library.status().ops == "loaded"


def assert_same(found, expected):
    """The same bits; on the reference, which promises none, the same numbers."""
    if COMPILED:
        assert torch.equal(found, expected)
    else:
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.fixture(params=VERSIONS)
def folder(request):
    return FOLDER / request.param


@pytest.fixture
def expected(folder):
    return torch.load(folder / "expected.pt", weights_only=True)


def test_there_are_files_of_every_kind():
    assert VERSIONS
    for version in VERSIONS:
        assert {file.name for file in (FOLDER / version).iterdir()} == set(FILES)


def test_a_state_dict_gives_the_same_bits(folder, expected):
    model = network().eval()
    model.load_state_dict(torch.load(folder / "state.pt", weights_only=True))
    for found, then in zip(outputs(model, expected["input"]), expected["outputs"], strict=True):
        assert_same(found, then)


def test_masks_are_the_same(folder, expected):
    model = network()
    model.load_state_dict(torch.load(folder / "state.pt", weights_only=True))
    for layer, then in zip(model, expected["masks"], strict=True):
        assert torch.equal(layer.perturbation(*then.shape[2:]), then)


def test_a_scripted_model_gives_the_same_bits(folder, expected):
    model = torch.jit.load(folder / "scripted.pt")
    assert_same(model(expected["input"]), expected["outputs"][-1])


def test_an_exported_model_gives_the_same_bits(folder, expected):
    model = torch.export.load(folder / "exported.pt2").module()
    assert_same(model(expected["input"]), expected["outputs"][-1])


def test_files_name_no_machine(folder):
    for file in folder.iterdir():
        content = file.read_bytes()
        for word in (b"site-packages", b"/python", b"/home", b"/work", b"/opt", b"/root", b"/tmp"):
            assert word not in content, (file.name, word)


def test_writing_refuses_a_folder_that_is_there(tmp_path, compiled_operators):
    write(tmp_path / "0.0.0")
    assert {file.name for file in (tmp_path / "0.0.0").iterdir()} == set(FILES)
    before = (tmp_path / "0.0.0" / "state.pt").read_bytes()
    with pytest.raises(FileExistsError):
        write(tmp_path / "0.0.0")
    assert (tmp_path / "0.0.0" / "state.pt").read_bytes() == before
    shutil.rmtree(tmp_path / "0.0.0")


def test_the_network_depends_on_nothing_else():
    torch.manual_seed(1)
    first = filled(network()).state_dict()
    torch.manual_seed(2)
    second = filled(network()).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
