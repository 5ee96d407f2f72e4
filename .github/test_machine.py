"""Tests of what surrounds the lesson of unet.py: devices, mixed precision, command line, files."""
import inspect, pickle, sys
from pathlib import Path
from unittest.mock import Mock
from urllib.error import URLError

import pytest, torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import unet
torch.set_num_threads(1)

@pytest.fixture(autouse=True)
def a_folder_with_a_photo_and_a_checkpoint(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(unet, "DEVICE", torch.device("cpu"))
    unet.draw_pair("cat")[0].save("cat.jpg")
    torch.save({"model": unet.UNet(base=2).state_dict(), "base": 2, "size": 32, "data": "toy",
                "losses": [(1.0, 1.0)]}, "unet.pt")

def shell(words):
    sys.argv = ["unet.py", *words.split()]
    unet.main()

@pytest.mark.filterwarnings("ignore:.*is a no-op")  # a meta tensor takes no saved values
@pytest.mark.parametrize("command", [lambda: unet.train("toy", size=32), unet.test, unet.show,
                                     lambda: unet.predict("cat.jpg")])
def test_all_tensors_are_on_the_device(command, monkeypatch):
    """Meta tensors have no values. A command must fail at reading one, not at mixing devices."""
    monkeypatch.setattr(unet, "DEVICE", torch.device("meta"))
    monkeypatch.setattr(unet, "loss_fn", Mock(return_value=torch.ones((), requires_grad=True)))
    with pytest.raises((RuntimeError, TypeError), match="meta tensor|Tensor.__format__"):
        command()
    assert all(tensor.is_meta for call in unet.loss_fn.call_args_list for tensor in call.args)

@pytest.mark.parametrize("device, on_cuda, on_cpu, fast", [
    ("cuda", True, False, True), ("cuda", False, True, False),
    ("cpu", False, True, True), ("cpu", True, False, False)])
def test_bfloat16_follows_the_hardware(device, on_cuda, on_cpu, fast, monkeypatch):
    monkeypatch.setattr(unet, "DEVICE", torch.device(device))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported",
                        lambda including_emulation=True: including_emulation or on_cuda)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": on_cpu})
    monkeypatch.setattr(torch, "autocast", Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        shell("test")
    assert torch.autocast.call_args.args == (device, torch.bfloat16)
    assert torch.autocast.call_args.kwargs["enabled"] == fast

def test_bfloat16_sees_new_weights(monkeypatch):
    """Red without cache_enabled=False."""
    net, outputs = torch.nn.Conv2d(1, 1, 1, bias=False), []
    def predict(photo):
        """Run a network of weight 1, then 2."""
        for number in (1, 2):
            torch.nn.init.constant_(net.weight, number)
            outputs.append(net(torch.ones(1, 1, 1, 1)))
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    monkeypatch.setattr(unet, "predict", predict)
    shell("predict cat.jpg")
    assert outputs[0].dtype == torch.bfloat16
    assert [output.item() for output in outputs] == [1, 2]

def test_shell_and_python_train_the_same_network(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)  # float32, as in a call from Python
    monkeypatch.setattr(unet, "open_pairs", Mock(return_value=unet.open_pairs("toy", "trainval")))
    unet.train(Path("a"), Path("b/c.pt"), epochs=2, batch_size=60, size=16, base=2, lr=0.1, seed=3)
    shell("train --data a --epochs 2 --batch-size 60 --size 16 --base 2 --lr 0.1 --seed 3")
    a, b = torch.load("b/c.pt"), torch.load("unet.pt")
    torch.testing.assert_close(a.pop("model"), b.pop("model"), rtol=0, atol=0)
    assert a == b == {"data": "a", "size": 16, "base": 2, "losses": a["losses"]}

def test_the_help_shows_the_defaults(capsys):
    with pytest.raises(SystemExit):
        shell("train --help")
    printed = " ".join(capsys.readouterr().out.split())
    for name, option in inspect.signature(unet.train).parameters.items():
        assert f"--{name.replace('_', '-')} {name.upper()} default: {option.default!r}" in printed

@pytest.mark.parametrize("words", ["", "train --epochs many", "test --epochs 1", "predict"])
def test_a_wrong_option_ends_in_usage(words):
    with pytest.raises(SystemExit, match="2"):  # argparse's status
        shell(words)

@pytest.mark.parametrize("words, told", [
    ("test --checkpoint none.pt", "none.pt"), ("predict none.jpg", "none.jpg"),
    ("predict unet.pt", "unet.pt"), ("train", "no route"),
    ("train --data toy --size 40", "40"), ("train --data toy --epochs 0", "0")])
def test_a_wrong_file_or_value_ends_in_one_line(words, told, monkeypatch):
    monkeypatch.setattr("urllib.request.urlopen", Mock(side_effect=URLError("no route")))
    with pytest.raises(SystemExit, match=rf"\A.*{told}.*\Z"):
        shell(words)

def test_a_crash_while_saving_keeps_the_old_checkpoint(monkeypatch):
    def save_half(saved, path):
        Path(path).write_text("half")
        raise KeyboardInterrupt
    old = Path("unet.pt").read_bytes()
    monkeypatch.setattr(torch, "save", save_half)
    with pytest.raises(KeyboardInterrupt):
        unet.train("toy", epochs=1, size=16, base=1)
    assert Path("unet.pt").read_bytes() == old

def test_a_checkpoint_that_runs_a_command_or_has_other_layers_is_refused():
    Path("evil.pt").write_bytes(b"cos\nsystem\n(S'touch sprung'\ntR.")  # os.system("touch sprung")
    with pytest.raises(pickle.UnpicklingError):
        unet.load("evil.pt")
    torch.save({"model": {}, "base": 2}, "other.pt")
    with pytest.raises(RuntimeError, match="enc1"):
        unet.load("other.pt")

def test_test_and_show_take_data_that_have_moved(capsys):
    torch.save(torch.load("unet.pt") | {"data": "gone"}, "moved.pt")
    unet.test("toy", "moved.pt")
    unet.show("toy", "moved.pt")
    assert "toy" in capsys.readouterr().out and Path("moved.png").exists()

def test_a_lost_pair_is_not_the_end_of_the_data():
    with pytest.raises(IndexError):
        unet.PetDataset(torch.utils.data.Subset([unet.draw_pair("cat")], [0, 1]), 32)
