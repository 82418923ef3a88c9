"""bench/start.py: when does a command's first token come?"""

import os
import sys

import pytest

from bench.start import caches, watch

SLOW = (
    "import sys, time; sys.stdout.write(' '); sys.stdout.flush(); time.sleep(0.3); print({!r}); {}"
)


def run(text, then="", **options):
    return watch([sys.executable, "-c", SLOW.format(text, then)], os.environ, **options)


def test_white_space_is_a_token_too():
    ran = run("def", "time.sleep(0.3)")
    assert ran.first <= ran.next - 0.2
    assert ran.next <= ran.end - 0.2
    assert ran.out.split() == ["def"]


def test_what_stands_before_the_mark_is_no_token():
    ran = run("prompt:", "sys.stdout.flush(); time.sleep(0.3); print('def')", mark="prompt:")
    assert ran.first >= 0.6


@pytest.mark.parametrize("then", ["sys.exit('no such model')", "sys.exit(3)"])
def test_a_failure_is_told_in_its_own_words(then):
    with pytest.raises(SystemExit, match=r"no such model|status 3"):
        run("def", then)


def test_silence_is_a_failure():
    with pytest.raises(SystemExit, match="status 0"):
        watch([sys.executable, "-c", "pass"], os.environ)


def test_caches_of_torch_and_ours_are_in_the_folder(tmp_path):
    found = {name: value for name, value in caches(tmp_path).items() if str(tmp_path) in value}
    assert set(found) == {"TMPDIR", "TORCHINDUCTOR_CACHE_DIR", "FASTEAGLE_CACHE"}
