"""Signals to one training process."""

import signal
import subprocess
import sys
import textwrap
import time

import children


def test_a_second_signal_ends_a_process_that_never_returns_to_python(tmp_path):
    script = """
        import ctypes, sys
        from lighthouse_core.job.stop import listen_for_stop, training_begins
        listen_for_stop()
        training_begins()
        print("ready", flush=True)
        # The second call never returns, whatever signals come.
        mutex, libc = ctypes.create_string_buffer(64), ctypes.CDLL(None)
        libc.pthread_mutex_lock(mutex), libc.pthread_mutex_lock(mutex)
    """
    process = children.start([sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGUSR1)
    process.send_signal(signal.SIGTERM)
    time.sleep(1.3)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=10) == 143


def test_a_signal_before_training_ends_a_process_at_once(tmp_path):
    script = """
        import time
        from lighthouse_core.job.stop import listen_for_stop
        listen_for_stop()
        print("ready", flush=True)
        time.sleep(60)
    """
    process = children.start([sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=10) == 130
