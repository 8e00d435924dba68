"""Training: flags, data, the loop. Imported before torch, because torch's threads read how to wait when they start."""

import os

# Beside a busy neighbour threads that spin while they wait made a step four times slower than threads that sleep
# (two threads on two cores, the sample's model); on idle cores the two are alike, as a training step's pieces are long.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
