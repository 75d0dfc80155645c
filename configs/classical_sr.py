# Classical super-resolution, bicubic x2 (--scale=3, 4, 8 for the others), SwinIR-M: the authors' recipe.
#
#   torchrun --nproc_per_node=8 train.py configs/classical_sr.py --dataroot_gt=DIV2K_HR --val_gt=Set5
#
# They trained x3, x4 and x8 from x2, in half the iterations at half the lr, as pretrain_network does here:
#
#   torchrun --nproc_per_node=8 train.py configs/classical_sr.py --scale=4 --dataroot_gt=DIV2K_HR \
#       --val_gt=Set5 --pretrain_network=experiments/classical_sr_x2/models/net_g_500000.pth \
#       --strict_load=False
#
# Published on Set5 (Y, border = scale) from DIV2K: x2 38.35, x3 34.89, x4 32.72 dB. On DIV2K and
# Flickr2K they used patches of 64 (--gt_size=128 for x2). Low-resolution images are made by MATLAB's imresize
# unless dataroot_lq names them. It took them 1.8 days on eight GPUs. Not trained here.
# Measured: 14 s a step on two CPU cores (bfloat16), so 82 days: for GPUs, on which it was not run.
name = lambda cfg: f"classical_sr_x{cfg.scale}"
scale, degradation = 2, "bicubic"
gt_size, batch_size = lambda cfg: 48 * cfg.scale, 32
embed_dim, depths, num_heads, window_size, mlp_ratio = 180, (6,) * 6, (6,) * 6, 8, 2
upsampler, loss = "pixelshuffle", "l1"
lr = lambda cfg: 1e-4 if cfg.pretrain_network else 2e-4
total_iters = lambda cfg: 250_000 if cfg.pretrain_network else 500_000
milestones, gamma = lambda cfg: tuple(cfg.total_iters * n // 20 for n in (10, 16, 18, 19)), 0.5
test_y_channel, crop_border = True, lambda cfg: cfg.scale
