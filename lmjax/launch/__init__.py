"""From a command line to a running config: settings, help, processes, memory, exit codes.

Every command ends with

    if __name__ == "__main__":
        run(experiment)

where `experiment` is a config with a method `run`.
"""

from lmjax.launch.command_line import command_name as command_name
from lmjax.launch.command_line import exit_on_user_error as exit_on_user_error
from lmjax.launch.command_line import from_command_line as from_command_line
from lmjax.launch.command_line import import_modules as import_modules
from lmjax.launch.command_line import user_modules as user_modules
from lmjax.launch.lateness import Limits as Limits
from lmjax.launch.processes import from_first as from_first
from lmjax.launch.processes import is_first as is_first
from lmjax.launch.processes import join_processes as join_processes
from lmjax.launch.processes import on_first as on_first
from lmjax.launch.program import run as run
from lmjax.launch.together import report as report
from lmjax.launch.together import set_limits as set_limits
