"""`chat` at a terminal: editing, Ctrl-C, wide characters, signals, and how it ends."""

import os
import pathlib
import pty
import re
import select
import signal
import subprocess
import time

import pytest

# Where tests are started by nohup the signal is ignored, which programs inherit.
signal.signal(signal.SIGHUP, signal.SIG_DFL)

ROOT = pathlib.Path(__file__).resolve().parents[4]
COMMAND = os.environ.get("CANDLE_COREML", str(ROOT / "target" / "debug" / "candle-coreml"))
LONGEST_WAIT_S = 30
PROMPT = "> "
CTRL_C, CTRL_D, BACKSPACE, TAB, UP = "\x03", "\x04", "\x7f", "\t", "\x1b[A"
STYLES = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")


class Terminal:
    """A program at a terminal of its own, and what it has shown."""

    def __init__(self, *arguments, data):
        mine, theirs = pty.openpty()
        environment = {**os.environ, "TERM": "xterm", "XDG_DATA_HOME": str(data), "LC_ALL": "C.UTF-8"}
        self.process = subprocess.Popen([COMMAND, "chat", *arguments], stdin=theirs, stdout=theirs, stderr=theirs,
                                        env=environment, start_new_session=True,
                                        preexec_fn=lambda: os.close(os.open(os.ttyname(0), os.O_RDWR)))
        os.close(theirs)
        self.file, self.shown, self.seen = mine, "", 0

    def type(self, text):
        os.write(self.file, text.encode())

    def read(self, seconds):
        """Takes what comes within the time; false when nothing does."""
        if not select.select([self.file], [], [], seconds)[0]:
            return False
        try:
            some = os.read(self.file, 65536)
        except OSError:
            some = b""
        self.shown += STYLES.sub("", some.decode(errors="replace"))
        return bool(some)

    def wait_for(self, text):
        """Waits until the text comes after what was waited for before, and gives what came up to it."""
        end = time.monotonic() + LONGEST_WAIT_S
        while (at := self.shown.find(text, self.seen)) < 0:
            if time.monotonic() > end or not self.read(LONGEST_WAIT_S):
                raise AssertionError(f"{text!r} did not come in {self.shown[self.seen:]!r}")
        before, self.seen = self.shown[self.seen:at], at + len(text)
        return before

    def code(self):
        while self.process.poll() is None and self.read(LONGEST_WAIT_S):
            pass
        return self.process.wait(timeout=LONGEST_WAIT_S)


@pytest.fixture
def chat(tmp_path):
    made = []

    def start(*arguments):
        terminal = Terminal("--seed", "3", *arguments, data=tmp_path)
        made.append(terminal)
        terminal.wait_for("/help lists commands")
        terminal.wait_for(PROMPT)
        return terminal

    yield start
    for terminal in made:
        terminal.process.kill()
        terminal.process.wait()
        os.close(terminal.file)


def test_ctrl_c_stops_the_answer_and_not_the_program(chat):
    terminal = chat("--max-tokens", "400")
    terminal.type("Tell me a story about a brave mouse.\r")
    terminal.wait_for("once")
    terminal.type(CTRL_C)
    terminal.wait_for(PROMPT)
    terminal.type("/stats\r")
    assert "cancelled" in terminal.wait_for("tokens used")
    terminal.wait_for(PROMPT)
    # At the line it takes back what was typed.
    terminal.type("nonsense" + CTRL_C)
    terminal.wait_for("Ctrl-D or /quit leaves")
    terminal.wait_for(PROMPT)
    terminal.type(CTRL_D)
    assert terminal.code() == 0


def test_lines_are_edited_by_characters_however_wide_and_however_many_bytes(chat, tmp_path):
    terminal = chat("--max-tokens", "3")
    terminal.type("日本語é" + "x" + BACKSPACE * 2 + "の猫\r")
    terminal.wait_for(PROMPT)
    terminal.type(CTRL_D)
    assert terminal.code() == 0
    history = (tmp_path / "candle-coreml" / "chat_history.txt").read_text()
    assert "日本語の猫" in history


def test_history_completion_and_several_lines(chat):
    terminal = chat("--max-tokens", "2")
    terminal.type("/sta" + TAB)
    terminal.wait_for("/stats")
    terminal.type("\r")
    terminal.wait_for("tokens used")
    terminal.wait_for(PROMPT)
    terminal.type(UP + "\r")
    terminal.wait_for("tokens used")
    terminal.wait_for(PROMPT)
    terminal.type("/multi\r")
    terminal.wait_for("| ")
    terminal.type("one\r")
    terminal.wait_for("| ")
    terminal.type("two\r")
    terminal.wait_for("| ")
    terminal.type(".\r")
    terminal.wait_for(PROMPT)
    terminal.type("/undo\r")
    terminal.wait_for("taken back: one")
    terminal.wait_for(PROMPT)
    terminal.type("/quit\r")
    assert terminal.code() == 0


@pytest.mark.parametrize("ends", [signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("answering", [False, True])
def test_what_ends_programs_ends_a_conversation(chat, ends, answering):
    terminal = chat("--max-tokens", "400")
    if answering:
        terminal.type("Tell me a story about a brave mouse.\r")
        terminal.wait_for("once")
    terminal.process.send_signal(ends)
    assert terminal.code() == -ends
