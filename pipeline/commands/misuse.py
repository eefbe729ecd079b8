"""What is wrong with a command line, in one line."""

from cyclopts import App, CycloptsError, UnknownOptionError, UnusedCliTokensError

MOST = 4
"""Commands that are named."""


def misuse(app: App, error: CycloptsError) -> str:
    """What was found, the nearest valid thing, and where the rest is listed."""
    said, chain = " ".join(str(error).split()), error.command_chain or ()
    if isinstance(error, UnusedCliTokensError) and error.unused_tokens:
        said = f"Unexpected argument: {' '.join(error.unused_tokens)}."
    if isinstance(error, UnknownOptionError):
        option = (error.token.keyword or error.token.value).partition("=")[0]
        if takers := _that_take(app, option):
            more = " and others" if len(takers) > MOST else ""
            said = f"Unknown option: {option}. It belongs to {', '.join(takers[:MOST])}{more}."
    return f"{said} See `{' '.join([app.name[0], *chain, '--help'])}`"


def _that_take(app: App, option: str) -> list[str]:
    """The commands that have this very option."""
    commands = [app[name] for name in app if not name.startswith("-")]
    return [
        command.name[0]
        for command in commands
        if command.default_command is not None
        and any(option in argument.names for argument in command.assemble_argument_collection())
    ]
