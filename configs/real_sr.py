# Real-world super-resolution x4, SwinIR-M: the authors' PSNR stage, from photographs alone.
#
#   torchrun --nproc_per_node=8 train.py configs/real_sr.py \
#       --dataroot_gt=DIV2K,Flickr2K,OST --val_gt=testset
#
# Photographs are degraded by BSRGAN's chain while training, those of val_gt once and for all
# (--degradation=realesrgan for Real-ESRGAN's, which also sharpens the ground truth). With
# dataroot_lq, and val_lq for validation, pairs of your own are used instead. configs/real_sr_gan.py
# is the stage that follows. SwinIR-L: --embed_dim=240 --depths=6,6,6,6,6,6,6,6,6
# --num_heads=8,8,8,8,8,8,8,8,8 --resi_connection=3conv. Published without PSNR. Not trained here.
# It needs GPUs: on two CPU cores a step takes a minute.
name = lambda cfg: f"real_sr_x{cfg.scale}"
scale = 4
degradation = "bsrgan"
gt_size = lambda cfg: 64 * cfg.scale
batch_size = 32

embed_dim = 180
depths = (6, 6, 6, 6, 6, 6)
num_heads = (6, 6, 6, 6, 6, 6)
window_size = 8
mlp_ratio = 2
upsampler = "nearest+conv"

loss = "l1"
lr = 2e-4
total_iters = 1_000_000
milestones = lambda cfg: tuple(cfg.total_iters * n // 20 for n in (10, 16, 18, 19))
gamma = 0.5

crop_border = lambda cfg: cfg.scale
