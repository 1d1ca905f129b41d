import pytest

from repulsor_jax.files import atomic
from tests.oracles import disks


def test_pieces_of_a_file_are_whole_after_a_full_disk(disk):
    file = atomic.Appender(disk / "lines")
    file.append(b"first\n")
    trouble = disks.Full(disk)
    trouble.on()
    pieces = [bytes([65 + k]) * 5000 + b"\n" for k in range(3)]
    for piece in pieces[:2]:
        with pytest.raises(OSError, match="No space left"):
            file.append(piece)
    trouble.off()
    file.append(pieces[2])
    assert (disk / "lines").read_bytes() == b"first\n" + b"".join(pieces)
