"""Links have their rate, hosts reach each other, and nothing is left behind, whatever ended the program."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.append(str(BENCHMARKS))

import shaped_network  # noqa: E402

SEND = """
import os, socket, sys, time
if os.environ["RANK"] == "0":
    listener = socket.create_server((os.environ["MASTER_ADDR"], 5000))
    peer, _ = listener.accept()
    total, start = 0, time.perf_counter()
    while chunk := peer.recv(1 << 16):
        total += len(chunk)
    print(total * 8e-9 / (time.perf_counter() - start))
else:
    for _ in range(100):
        try:
            peer = socket.create_connection((os.environ["MASTER_ADDR"], 5000))
            break
        except OSError:
            time.sleep(0.1)
    peer.sendall(bytes(int(sys.argv[1])))
"""


def available() -> bool:
    try:
        shaped_network.check()
    except shaped_network.NetworkError:
        return False
    return True


shaped = pytest.mark.skipif(not available(), reason="needs root, ip and tc")


def left() -> list[str]:
    names = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout.split()
    return [name for name in names if name.startswith(f"{shaped_network.PREFIX}-{os.getpid()}-")]


@pytest.fixture
def program(tmp_path):
    path = tmp_path / "send.py"
    path.write_text(SEND)
    return str(path)


@shaped
def test_a_link_is_no_faster_than_its_rate(program):
    with shaped_network.shaped_network([2], 0.05) as hosts:
        assert [host.address for host in hosts] == ["10.77.0.1", "10.77.0.2"]
        found = float(shaped_network.run_ranks(hosts, [program, str(2 << 20)], 60))
    assert 0 < found < 0.06  # a loaded machine may be slower, never faster
    assert not left()


@shaped
def test_between_nodes_the_uplink_limits(program):
    with shaped_network.shaped_network([1, 1], 1.0, outer_gbit=0.05) as hosts:
        assert [host.node for host in hosts] == [0, 1]
        assert float(shaped_network.run_ranks(hosts, [program, str(2 << 20)], 60)) < 0.06
    assert not left()


@shaped
def test_a_rank_that_fails_is_an_error_that_says_why(tmp_path):
    path = tmp_path / "fail.py"
    path.write_text("import os, time\nif os.environ['RANK'] == '1':\n    raise SystemExit('no luck')\ntime.sleep(60)")
    with pytest.raises(shaped_network.NetworkError, match="rank 1 failed: no luck"):
        with shaped_network.shaped_network([2], 1.0) as hosts:
            shaped_network.run_ranks(hosts, [str(path)], 60)
    assert not left()


@shaped
def test_ranks_that_hang_are_stopped(tmp_path):
    path = tmp_path / "hang.py"
    path.write_text("import time\ntime.sleep(60)")
    with pytest.raises(shaped_network.NetworkError, match="not done within 1 s"):
        with shaped_network.shaped_network([2], 1.0) as hosts:
            shaped_network.run_ranks(hosts, [str(path)], 1)
    assert not left()


@shaped
@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nothing_is_left_behind(tmp_path, ending):
    path = tmp_path / "wait.py"
    path.write_text(
        f"import sys, time\nsys.path.append({str(BENCHMARKS)!r})\nimport shaped_network\n"
        "with shaped_network.shaped_network([2], 1.0) as hosts:\n    print('up', flush=True)\n    time.sleep(60)\n"
    )
    process = subprocess.Popen(
        [sys.executable, str(path)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert process.stdout.readline() == "up\n"
    own = f"{shaped_network.PREFIX}-{process.pid}-"
    process.send_signal(ending)
    process.wait(30)
    process.stdout.close()
    if ending == signal.SIGKILL:  # nobody can tidy up then; the next one does
        with shaped_network.shaped_network([1], 1.0):
            pass
    time.sleep(0.1)
    assert own not in subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout


@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGTERM])
def test_no_rank_on_loopback_is_left_behind(tmp_path, ending):
    rank, path = tmp_path / "rank.py", tmp_path / "start.py"
    rank.write_text(
        f"import os, pathlib, time\npathlib.Path({str(tmp_path)!r}, f'pid{{os.getpid()}}').touch()\ntime.sleep(60)\n"
    )
    path.write_text(
        f"import sys\nsys.path.append({str(BENCHMARKS)!r})\nimport shaped_network\n"
        f"shaped_network.run_ranks(2, [{str(rank)!r}], 60)\n"
    )
    process = subprocess.Popen([sys.executable, str(path)], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 30
    while len(started := list(tmp_path.glob("pid*"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(ending)
    process.wait(30)
    assert len(started) == 2 and not any(Path(f"/proc/{file.name[3:]}").exists() for file in started)


@shaped
def test_a_second_ctrl_c_does_not_end_the_tidying(tmp_path, monkeypatch):
    delete, gone = shaped_network._delete, []

    def delete_while_pressed(name):
        os.kill(os.getpid(), signal.SIGINT)
        delete(name)
        gone.append(name)

    with pytest.raises(KeyboardInterrupt):
        with shaped_network.shaped_network([1], 1.0):
            monkeypatch.setattr(shaped_network, "_delete", delete_while_pressed)
            raise KeyboardInterrupt
    assert len(gone) == 2 and not left()


def test_says_what_is_missing(monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(shaped_network.NetworkError, match="need root"):
        shaped_network.check()
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(shaped_network.shutil, "which", lambda tool: None)
    with pytest.raises(shaped_network.NetworkError, match="there is no ip: install iproute2"):
        shaped_network.check()
