"""`python -m brainfm.train RECIPE key=value …`, also under torchrun; the same as `brainfm pretrain`."""

from brainfm.train.command import pretrain_command

if __name__ == "__main__":
    pretrain_command(prog_name="python -m brainfm.train")
