# Lightweight super-resolution, bicubic x2 (--scale=3, 4 for the others), SwinIR-S: the authors' recipe.
#
#   python train.py configs/lightweight_sr.py --dataroot_gt=DIV2K_HR --val_gt=Set5
#
# They trained x3 and x4 from x2: --scale=4 --pretrain_network=FILE --strict_load=False, which halves the
# iterations and the lr. Published on Set5 (Y, border = scale): x2 38.14, x3 34.62, x4 32.44 dB. Low-
# resolution images are made by MATLAB's imresize unless dataroot_lq names them. Not trained here.
# Measured: 12 to 18 s a step on two CPU cores (bfloat16), 70 days or more: for GPUs; not run on one.
name = lambda cfg: f"lightweight_sr_x{cfg.scale}"
scale, degradation = 2, "bicubic"
gt_size, batch_size = lambda cfg: 64 * cfg.scale, 64
embed_dim, depths, num_heads, window_size, mlp_ratio = 60, (6,) * 4, (6,) * 4, 8, 2
upsampler, loss = "pixelshuffledirect", "l1"
lr = lambda cfg: 1e-4 if cfg.pretrain_network else 2e-4
total_iters = lambda cfg: 250_000 if cfg.pretrain_network else 500_000
milestones, gamma = lambda cfg: tuple(cfg.total_iters * n // 20 for n in (10, 16, 18, 19)), 0.5
test_y_channel, crop_border = True, lambda cfg: cfg.scale
