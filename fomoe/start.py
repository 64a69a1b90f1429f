"""Where the `fomoe` command begins, before the imports that take time.

Owns: Ctrl-C until then. Does not know: commands.
"""

import signal


def let_ctrl_c_end() -> None:
    """Until exit_status() has its own way with Ctrl-C, it ends the process as it ends any program:
    in the midst of imports there is nothing to tell, and nothing to give back."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else it is ignored
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def main() -> int:
    """As fomoe.cli.main."""
    let_ctrl_c_end()
    from fomoe.cli import main

    return main()
