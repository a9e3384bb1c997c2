"""`moectl status`: once, as JSON, or again and again."""

from __future__ import annotations

import asyncio
from pathlib import Path

from rich.live import Live
from rich.text import Text

from moe_cli import live, status
from moe_cli.documents import read_state
from moe_cli.outcome import Exit
from moe_cli.say import Say
from moe_core.http import session

WATCH_S = 1.0


async def show_status(folder: Path, say: Say, *, as_json: bool, watch: bool) -> Exit:
    """Exit code 0 also where nothing runs: that is an answer. `--json` has `running` for scripts."""
    async with session(connect_s=1.0, read_s=status.ASK_S) as client:
        screen = Live(console=say.out, auto_refresh=False) if watch and not as_json and say.out.is_terminal else None
        try:
            if screen is not None:
                screen.start()
            while True:
                report = await status.report(client, read_state(folder), str(folder))
                lines = live.report_lines(report)
                if screen is not None:
                    screen.update(Text("\n".join(lines)), refresh=True)
                elif as_json:
                    say.line(report.model_dump_json(by_alias=True))
                else:
                    for line in lines:
                        say.line(line)
                if not watch:
                    return Exit.OK
                await asyncio.sleep(WATCH_S)
        finally:
            if screen is not None:
                screen.stop()
