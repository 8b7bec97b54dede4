"""For test_sharded_verbs.py: several command lines in the processes of one torchrun, to spare their imports."""

from __future__ import annotations

import json
import os
import sys

from lit_lora.__main__ import main

if __name__ == "__main__":
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"  # one store knows one group of processes
    for port, arguments in json.loads(sys.argv[1]):
        os.environ["MASTER_PORT"] = str(port)
        main(arguments)
