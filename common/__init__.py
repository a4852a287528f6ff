"""What both sides must agree on; imports none of the other rooms."""

import logging

# PEFT imports bitsandbytes, which says on every start that a faster kernel could be installed.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
