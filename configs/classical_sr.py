# Classical super-resolution, bicubic x2 (--scale=3, 4, 8 for the others), SwinIR-M: the authors'
# recipe.
#
#   torchrun --nproc_per_node=8 train.py configs/classical_sr.py \
#       --dataroot_gt=DIV2K_HR --val_gt=Set5
#
# They trained x3, x4 and x8 from x2, in half the iterations at half the lr, as pretrain_network
# does here:
#
#   torchrun --nproc_per_node=8 train.py configs/classical_sr.py --scale=4 \
#       --dataroot_gt=DIV2K_HR --val_gt=Set5 --strict_load=False \
#       --pretrain_network=experiments/classical_sr_x2/models/net_g_500000.pth
#
# Published on Set5 (Y, border = scale) from DIV2K: x2 38.35, x3 34.89, x4 32.72 dB. On DIV2K and
# Flickr2K they used patches of 64 (--gt_size=128 for x2). Low-resolution images are made by
# MATLAB's imresize unless dataroot_lq names them. It took them 1.8 days on eight GPUs. Not trained
# here. A step takes 14 s on two CPU cores, so this is for GPUs.
name = lambda cfg: f"classical_sr_x{cfg.scale}"
scale = 2
degradation = "bicubic"
gt_size = lambda cfg: 48 * cfg.scale
batch_size = 32

embed_dim = 180
depths = (6, 6, 6, 6, 6, 6)
num_heads = (6, 6, 6, 6, 6, 6)
window_size = 8
mlp_ratio = 2
upsampler = "pixelshuffle"

loss = "l1"
lr = lambda cfg: 1e-4 if cfg.pretrain_network else 2e-4
total_iters = lambda cfg: 250_000 if cfg.pretrain_network else 500_000
milestones = lambda cfg: tuple(cfg.total_iters * n // 20 for n in (10, 16, 18, 19))
gamma = 0.5

test_y_channel = True
crop_border = lambda cfg: cfg.scale
