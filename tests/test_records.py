"""records.py: what is read back after a kill, a cut, a changed byte, a full disk."""

import json
import multiprocessing
import resource
import signal

import pytest

from jobs.records import RecordFile, read_records
from localized_crops.files import UserError


def write_records(path, count=3):
    records = RecordFile(path)
    for number in range(count):
        records.append({"batch": number, "feat": [2, 3]}, bytes([number]) * (10 + number))
    records.close()


def numbers(path):
    return [record.header["batch"] for record in read_records(path)]


def test_records_survive_every_cut(tmp_path):
    path = tmp_path / "maps.records"
    write_records(path)
    whole = path.read_bytes()
    ends = [len(whole)]
    for cut in range(len(whole) - 1, -1, -1):
        path.write_bytes(whole[:cut])
        found = numbers(path)
        assert found == list(range(len(found)))
        if len(found) < len(numbers_before := list(range(4 - len(ends)))):
            ends.append(cut)
            assert len(found) == len(numbers_before) - 1
    assert len(ends) == 4  # each record was lost at one cut


def test_writing_goes_on_after_the_last_whole_record(tmp_path):
    path = tmp_path / "maps.records"
    write_records(path)
    path.write_bytes(path.read_bytes()[:-4])
    records = RecordFile(path)
    records.append({"batch": 7}, b"x")
    records.close()
    assert numbers(path) == [0, 1, 7]


@pytest.mark.parametrize("place", [0, 20, -3])
def test_a_changed_byte_ends_the_records(tmp_path, place):
    path = tmp_path / "maps.records"
    write_records(path, 1)
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)
    assert numbers(path) == []


def test_a_record_that_declares_too_much_is_not_read(tmp_path):
    path = tmp_path / "maps.records"
    path.write_bytes(json.dumps({"header": {}, "bytes": 10**15, "crc": 0}).encode() + b"\nabc")
    assert numbers(path) == []


def full_disk(path, queue):
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300, 300))  # bytes: the next write fails as on a full disk
    try:
        write_records(path, 50)
    except UserError as error:
        queue.put(str(error))


def test_a_full_disk_keeps_the_finished_records(tmp_path):
    path = tmp_path / "maps.records"
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    worker = context.Process(target=full_disk, args=(path, queue))
    worker.start()
    assert "make room" in queue.get(timeout=300)
    worker.join()
    assert len(numbers(path)) >= 2
    write_records(path, 1)
    assert numbers(path)[-1] == 0
