# The speed run: from nothing to 31.24 dB, the figure of DnCNN, on all of CBSD68 (colour, sigma 25),
# in as little time as possible. The rules and the record are in tests/RESULTS.md.
#
#   torchrun --nproc_per_node=2 train.py configs/speedrun.py --dataroot_gt=BSD400 --val_gt=CBSD68
#
# On a CPU, two ranks of one thread each are faster than one rank of two threads.
name = "speedrun"
gt_size = 40
batch_size = 16
num_workers = 0

embed_dim = 48
depths = (2, 2, 2)
num_heads = (1, 1, 1)
window_size = 8
mlp_ratio = 2
resi_connection = "3conv"
drop_path_rate = 0.0
init_std = 0.1

loss = "mse"
optimizer = "muon"
lr = 5e-3
betas = (0.9, 0.99)
grad_clip = 0.05
scheduler = "cosine"
warmup_iters = 50
total_iters = 3600

print_freq = 50
val_freq = 3600
save_checkpoint_freq = 600
