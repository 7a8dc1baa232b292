"""Every option and argument of every command, each declared once: a name means the same wherever it is taken.

An alias with a type variable is completed where it is used: `Recipe[str]` has a default, `Recipe[str | None]` need not.
"""

from l4pack.cli.options.budget import *
from l4pack.cli.options.checking import *
from l4pack.cli.options.publishing import *
from l4pack.cli.options.quantizing import *
from l4pack.cli.options.running import *
from l4pack.cli.options.subject import *
from l4pack.cli.options.talking import *
from l4pack.cli.options.text import *
