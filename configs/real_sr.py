# Real-world super-resolution x4, SwinIR-M: the authors' PSNR stage, on pairs that you bring.
#
#   torchrun --nproc_per_node=8 train.py configs/real_sr.py --dataroot_gt=HR --dataroot_lq=LR
#
# The authors degrade by BSRGAN, while training, and add a GAN stage; neither is here: bring pairs, for
# validation too (val_gt, val_lq). SwinIR-L: --embed_dim=240 --depths=6,6,6,6,6,6,6,6,6
# --num_heads=8,8,8,8,8,8,8,8,8 --resi_connection=3conv. Published without PSNR. Not trained here.
# Measured: 56 s a step on two CPU cores (bfloat16), so 646 days: for GPUs, on which it was not run.
name = lambda cfg: f"real_sr_x{cfg.scale}"
scale, degradation = 4, "real"
gt_size, batch_size = lambda cfg: 64 * cfg.scale, 32
embed_dim, depths, num_heads, window_size, mlp_ratio = 180, (6,) * 6, (6,) * 6, 8, 2
upsampler, loss = "nearest+conv", "l1"
lr, total_iters = 2e-4, 1_000_000
milestones, gamma = lambda cfg: tuple(cfg.total_iters * n // 20 for n in (10, 16, 18, 19)), 0.5
crop_border = lambda cfg: cfg.scale
