"""Small trainings with distclip, started from the root of the repository.

python -m launch.train --steps 50                                          one rank
torchrun --standalone --nproc-per-node=2 -m launch.train --layout fsdp2    several
python -m launch.run --standalone --nproc-per-node=2 -m launch.train       several: see `launch.run`
python -m launch.compare                                                   several policies
"""
