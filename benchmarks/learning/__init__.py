"""Process rewards beside outcome-only RLOO on small tasks, over several seeds.

    python -m benchmarks.learning --task chain6 --arms rloo published critic pav+warm --seeds 0 1 2 3 4 --sft-per-seed

Every run is the command a user would type, in its own process, with its output in OUT/TASK/NAME.log. Calling it again
skips what is finished and resumes what was interrupted, so arms, seeds and steps can be added later; --report runs
nothing and takes what is finished. Writes learning.json and pictures to OUT/TASK, and prints Markdown tables.
key=value arguments go to every sft and train command.

All arms of a seed share what can be shared: SFT model, order of prompts, the random numbers that responses are sampled
with. So seeds are pairs, and arms are compared with RLOO within them (`summary.paired`).
"""
