"""How a reader looks (rules R1-R5), and what of a spool is opened at all."""

import errno
import json
import os
import stat

import pytest

from chaperone.errors import NoRunError, SpoolError
from chaperone.model.request import Request
from chaperone.spool import format, look
from spool_tests.support import disk
from spool_tests.support.processes import open_fds

# -- opening a spool


def test_spool_is_made_for_us_alone(tmp_path):
    old = os.umask(0)
    try:
        os.close(format.open_spool(str(tmp_path / "new"), create=True))
    finally:
        os.umask(old)
    assert [
        stat.S_IMODE(os.stat(tmp_path / "new" / name).st_mode)
        for name in ("", ".running", ".ended")
    ] == [0o700] * 3
    os.close(format.open_spool(str(tmp_path / "new"), create=True))


def refusal(path, create=False):
    before = open_fds(str(path))
    with pytest.raises(SpoolError) as caught:
        format.open_spool(str(path), create)
    assert open_fds(str(path)) == before
    return str(caught.value)


def test_spool_that_is_not_there_is_told(tmp_path):
    assert (
        refusal(tmp_path / "no")
        == f"unable to open spool {str(tmp_path / 'no')!r}: No such file or directory"
    )
    assert (
        refusal(tmp_path / "no" / "parent", create=True)
        == f"unable to open spool {str(tmp_path / 'no' / 'parent')!r}: No such file or directory"
    )
    (tmp_path / "file").touch()
    assert (
        refusal(tmp_path / "file")
        == f"unable to open spool {str(tmp_path / 'file')!r}: Not a directory"
    )


@pytest.mark.parametrize("mode", [0o720, 0o702, 0o777, 0o1777])
def test_spool_that_others_may_write_to_is_refused(spool, mode):
    spool.chmod(mode)
    assert refusal(spool) == (
        f"unable to use spool {str(spool)!r}: want it writable only by its owner,"
        f" got mode {mode:04o}"
    )
    spool.chmod(0o755)
    os.close(format.open_spool(str(spool)))


@pytest.mark.root
def test_spool_of_somebody_else_is_refused(spool):
    os.chown(spool, 12345, 12345)
    assert (
        refusal(spool)
        == f"unable to use spool {str(spool)!r}: want it owned by uid 0, got uid 12345"
    )
    os.chown(spool, 0, 0)


@pytest.mark.user
def test_spool_of_root_is_refused():
    assert (
        refusal("/") == f"unable to use spool '/': want it owned by uid {os.geteuid()}, got uid 0"
    )


@pytest.mark.root
@pytest.mark.parametrize(
    "what",
    [
        ".running",
        ".ended",
        "r",
        "r/lock",
        "r/stdout",
        "r/status.json",
        "r/running.json",
        "r/control",
    ],
)
def test_parts_of_somebody_else_are_refused(spool, what):
    run = disk.create(spool)
    if what == "r/status.json":
        run.publish(disk.terminated(run))
    os.chown(spool / what, 12345, 12345)
    with disk.opened(spool) as spool_fd, pytest.raises(SpoolError):
        format.live_ids(spool_fd), format.ended_ids(spool_fd)
        run_fd = format.open_run(spool_fd, "r")
        try:
            look.look(run_fd, "r")
            os.close(look.open_stream(run_fd, "stdout"))
            look.request(run_fd, "r", Request("stop"))
        finally:
            os.close(run_fd)
    run.close()


# -- names and entries


def test_ids_are_told_apart_from_everything_else(spool):
    live, ended, collected = (disk.create(spool, name) for name in ("live", "ended", "collected"))
    disk.end(ended), disk.end(collected)
    (
        (spool / ".x.1.new").mkdir(),
        (spool / ".x.1.gone").mkdir(),
        (spool / ".running" / ".tmp").touch(),
    )
    with disk.opened(spool) as spool_fd:
        look.collect(spool_fd, "collected")
        assert (format.live_ids(spool_fd), format.ended_ids(spool_fd)) == (["live"], ["ended"])
        assert format.all_ids(spool_fd) == ["collected", "ended", "live"]
        assert [
            format.where_entered(spool_fd, name) for name in ("live", "ended", "collected")
        ] == [".running", ".ended", None]
        assert format.hidden_directories(spool_fd, format.NEW) == [
            ".x.1.new"
        ] and format.hidden_directories(spool_fd, format.GONE) == [".x.1.gone"]
    live.close()


def test_fresh_spool_has_no_runs(spool):
    with disk.opened(spool) as spool_fd:
        assert (
            format.live_ids(spool_fd)
            == format.ended_ids(spool_fd)
            == format.all_ids(spool_fd)
            == []
        )
        look.collect(spool_fd, "r")


@pytest.mark.parametrize("name", ["../outside", "..", ".", "", ".running", "a/b", "a\0b", "\udcff"])
def test_no_id_leads_out_of_the_spool(spool, tmp_path, name):
    (tmp_path / "outside").mkdir()
    disk.create(spool).close()
    with disk.opened(spool) as spool_fd:
        with pytest.raises(NoRunError) as caught:
            format.open_run(spool_fd, name)
        assert str(caught.value) == f"unable to find run {name!r}: that is not a valid run id"
        look.collect(spool_fd, name)
    assert (tmp_path / "outside").exists() and os.listdir(spool / ".running") == ["r"]


def test_run_that_is_not_there_is_told(spool):
    with disk.opened(spool) as spool_fd, pytest.raises(NoRunError) as caught:
        format.open_run(spool_fd, "r")
    assert (str(caught.value), caught.value.errno) == (
        "unable to find run 'r': No such file or directory",
        errno.ENOENT,
    )


def test_collect_takes_an_ended_run_and_no_live_one(spool):
    run = disk.create(spool)
    with disk.opened(spool) as spool_fd:
        look.collect(spool_fd, "r")
        assert os.listdir(spool / ".running") == ["r"]
        run.publish(disk.terminated(run))
        look.collect(spool_fd, "r")  # its chaperone lives and will move the entry
        assert os.listdir(spool / ".running") == ["r"]
        run.end()
        look.collect(spool_fd, "r"), look.collect(spool_fd, "r")
    assert (
        os.listdir(spool / ".running") == os.listdir(spool / ".ended") == []
        and (spool / "r" / "status.json").exists()
    )


def test_collected_run_does_not_come_back_when_its_ending_is_finished(spool):
    from chaperone.spool import reap as reaping

    run = disk.create(spool)
    run.publish({**disk.terminated(run), "boot_id": look.boot_id()})
    run.close()  # killed before it could move the entry
    with disk.opened(spool) as spool_fd:
        look.collect(spool_fd, "r")
        assert [found.done for found in reaping.reap(str(spool))] == ["finished"]
        assert format.ended_ids(spool_fd) == format.live_ids(spool_fd) == []
    assert "lock" not in os.listdir(spool / "r")


# -- planted things


PLANTS = {
    "symlink": lambda path, outside: path.symlink_to(outside),
    "dangling": lambda path, outside: path.symlink_to("nowhere"),
    # By another user, who can only do so where the directory lets others write.
    "hard link": lambda path, outside: (os.link(outside, path), path.parent.chmod(0o777)),
    "fifo": lambda path, outside: os.mkfifo(path),
    "directory": lambda path, outside: path.mkdir(),
    "socket": lambda path, outside: os.mknod(path, stat.S_IFSOCK | 0o600),
}


@pytest.mark.parametrize("plant", PLANTS)
@pytest.mark.parametrize(
    "name", ["lock", "running.json", "status.json", "spec.json", "stdout", "log", "control"]
)
def test_planted_file_is_refused_and_nothing_hangs(spool, tmp_path, plant, name):
    run = disk.create(spool)
    outside = tmp_path / "outside"
    outside.write_text(json.dumps({**disk.terminated(run), "labels": {"stolen": "yes"}}))
    path = spool / "r" / name
    path.unlink(missing_ok=True)
    PLANTS[plant](path, outside)
    before = open_fds(str(tmp_path))

    def tried(reader):
        try:
            return reader()
        except (SpoolError, FileNotFoundError, NoRunError) as error:
            assert "\n" not in str(error)
            return None

    with disk.opened(spool) as spool_fd:
        run_fd = format.open_run(spool_fd, "r")
        found = tried(lambda: look.look(run_fd, "r"))
        assert found is None or "stolen" not in found[1]["labels"]
        tried(lambda: look.request(run_fd, "r", Request("stop")))
        if name in format.STREAMS or name == "log":
            with pytest.raises(SpoolError):
                look.open_stream(run_fd, name)
        os.close(run_fd)
    assert open_fds(str(tmp_path)) == before
    run.close()


def test_entries_behind_a_symlink_are_not_read(spool, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "r").touch()
    (spool / ".ended").symlink_to(tmp_path / "elsewhere")
    with disk.opened(spool) as spool_fd:
        for what in (lambda: format.ended_ids(spool_fd), lambda: look.collect(spool_fd, "r")):
            with pytest.raises(SpoolError) as caught:
                what()
            assert str(caught.value) == "unable to open '.ended' of the spool: Not a directory"
    assert (tmp_path / "elsewhere" / "r").exists()


def test_only_streams_and_the_log_are_opened_as_such(spool):
    run = disk.create(spool)
    for name in ("stdout", "stderr", "log"):
        os.close(look.open_stream(run.fd, name))
    for name in ("spec.json", "../../etc/passwd", "", "lock"):
        with pytest.raises(SpoolError) as caught:
            look.open_stream(run.fd, name)
        assert str(caught.value) == f"unable to open stream {name!r}: want stdout, stderr or log"
    run.close()
