"""Every knob, with its default. The other configs start from this one and change what differs.

Override any of them from the command line: `--config.optimizer.learning_rate=3e-4`.
Types and values are checked before anything starts (`repulsor_jax/config.py`).
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    """Returns the full configuration: SiT-S/2 on 32x32x4 latents with the memory bank."""
    c = ml_collections.ConfigDict()

    c.seed = 0  # of parameters, noise, timesteps, label dropout and the order of the data
    c.total_steps = 400_000  # optimizer steps
    c.batch_size = 256  # global: over all devices and hosts, and over accumulation_steps

    c.model = ml_collections.ConfigDict()
    c.model.latent_size = 32  # height and width of the latents
    c.model.in_channels = 4  # channels of the latents
    c.model.patch_size = 2
    c.model.hidden_size = 384
    c.model.depth = 12
    c.model.num_heads = 6
    c.model.mlp_ratio = 4.0
    c.model.num_classes = 1000  # label num_classes is the null class of guidance
    c.model.label_dropout = 0.1  # part of labels that become the null class; guidance needs it
    c.model.learn_sigma = False  # twice the output channels, of which the first half is used
    c.model.qk_norm = False  # normalise queries and keys: steadier at high learning rates
    c.model.scan_blocks = True  # one compiled block for all: compiles faster; same results
    # Recomputed in the backward pass: "dots" all but projections, "dots_attention" all but these
    # and cuDNN's attention, "full" everything.
    c.model.remat = "none"  # docs/plan.md, "What remat costs"
    c.model.dtype = "bfloat16"  # of the computation; parameters are always float32
    c.model.attention = "auto"  # "xla", "cudnn" (NVIDIA, bfloat16); "auto": cuDNN where it runs
    # In training a token sees those of its group alone; in sampling all see all.
    c.model.attention_separation = False  # needs flow.time_groups
    c.model.time_steps = 0  # 1000: the network reads the index of DiT's steps in place of t
    # Published weights, or those of --mode=export, to start training from, or to sample and
    # evaluate where the working directory has no checkpoint: a file, a folder with
    # model.safetensors, or "owner/name/file" of a Hugging Face repository (docs/weights.md).
    c.model.init_from = ""  # "": training starts from random parameters
    # Which way the file's time runs and what it predicts: "sit", "reversed" (REPA, SRA) or "dit".
    c.model.init_convention = "auto"  # by the tensors
    # "blockwise" (docs/systems.md): `depth` blocks are shared by all times, and each of `segments`
    # equal parts of time has a stack of blocks of its own.
    c.model.architecture = "dit"  # "dit" or "blockwise"
    c.model.segments = 6  # blockwise: parts of time; batches are multiples of it
    c.model.segment_depth = 5  # blockwise: blocks of each stack
    c.model.adaln_rank = 288  # blockwise: rank of the modulation; 0 is full
    # blockwise, a second stage: blocks of a network that stands in for the shared ones after the
    # first step of a segment. Only this network is trained, on the run residual.base_run.
    c.model.residual_depth = 0  # 4 is published; 0 is none

    # The run whose averaged parameters a residual network is trained for; read at its first step.
    c.residual = ml_collections.ConfigDict()
    c.residual.base_run = ""  # its working directory or checkpoints; needs model.residual_depth
    c.residual.base_step = -1  # which of its checkpoints; -1 is the newest

    c.flow = ml_collections.ConfigDict()
    c.flow.path = "linear"  # "linear", "gvp", "vp" or "ddpm_linear" (DiT's 1,000 steps)
    c.flow.prediction = "velocity"  # "velocity", "score" or "noise"
    c.flow.weighting = "none"  # of score and noise losses: "none", "velocity" or "likelihood"
    c.flow.time_distribution = "uniform"  # "uniform" or "logit_normal"
    c.flow.logit_normal_location = 0.0  # mean of logit(t); t = 0 is noise, t = 1 is data
    c.flow.logit_normal_scale = 1.0  # standard deviation of logit(t)
    c.flow.time_shift = 1.0  # above 1: more times near noise, t / (t + shift (1 - t))
    # In training the tokens of an image are split at random into so many groups, each at a time of
    # its own (docs/systems.md). Samples have one time, as ever.
    c.flow.time_groups = 1  # 1 is off
    c.flow.group_fractions = ()  # of the tokens, as (0.25, 0.75), published; (): equal ones
    c.flow.whole_fraction = 0.0  # part of the images that are left whole
    # What a teacher sees: each group's t moved by itself ("sra"), all at the time of the cleanest
    # ("self_flow"), or the student's times ("same").
    c.flow.teacher_times = "sra"  # or "self_flow", "same"

    # Where the path starts, docs/systems.md: N(0, I), or by class mean + scale noise, learned.
    c.source = ml_collections.ConfigDict()
    c.source.name = "gaussian"  # or "class"
    c.source.rank = 256  # width of its table of classes and of its hidden layer
    c.source.learn_variance = False  # otherwise the variance is 1, and the mean alone is learned
    c.source.variance_weight = 5.0  # of the penalty that keeps a learned variance near 1
    c.source.alignment_weight = 1.0  # of the penalty that turns the mean towards the data; 0: none
    c.source.alignment_axis = "channels"  # of its directions; or "width", as released
    c.source.detach_target = False  # no gradient through the target, through x_t alone
    c.source.null = "class"  # rows whose label is dropped: their "class"'s source, or "gaussian"

    # Tasks by further input channels (arXiv 2307.08698; docs/systems.md): filling holes, "inpaint",
    # or drawing images from label maps, "semantic".
    c.conditioning = ml_collections.ConfigDict()
    c.conditioning.kind = "none"  # "none", "inpaint" or "semantic"
    # inpaint: the network is shown the encoded masked "image" (--mode=encode stores some of each),
    # or the "latent" without the cells that the hole touches, drawn anew in each step: our form.
    c.conditioning.masked = "latent"  # "latent" or "image"
    c.conditioning.masks_per_image = 4  # encoded with masked="image"
    c.conditioning.classes = 0  # semantic: of the label maps
    c.conditioning.channels = 4  # semantic: to which a learned 1x1 map takes the classes
    c.conditioning.maps_path = ""  # semantic: folder of label maps, PNG files named as the images
    # "test" or "train", the images of data.dir, or an .npz with images and masks, or with maps
    # (docs/systems.md). Sample i is of image i mod n, and has its label where that is known.
    c.conditioning.images = "test"  # what samples are drawn for
    # How holes are filled: by the network's "channels", or by a network without any, "replace": at
    # each step what is known is put in the place of what was drawn.
    c.conditioning.filling = "channels"  # "channels" or "replace"

    # "none", or a sum as "repulsor+layersync" of contrastive_flow, dispersive, feature_alignment,
    # latent_alignment, layersync, repulsor and sra. Each has its section below; docs/method.md
    # explains them, and configs/objectives.py has published sets of values.
    c.terms = "repulsor"  # losses beside the flow loss

    c.repulsor = _term(weight=0.5)
    c.repulsor.block = -1  # index of the block whose output is tapped; -1 is depth // 4
    c.repulsor.positives = "none"  # or "view": InfoNCE with the same image at another noise level
    # What the bank holds: projections of the "online" network, of the EMA "teacher" (slow; needs a
    # forward pass of its first blocks), or of the clean "latent" (no pass; needs positives).
    c.repulsor.bank_keys = "online"  # "online", "teacher" or "latent"
    c.repulsor.negatives = "all"  # "none": positives alone, a control
    c.repulsor.time_gap = 0.2  # the teacher sees the image at min(1, t + U(0, time_gap))
    c.repulsor.view_noise = "same"  # of what the teacher sees: the student's, or "new"
    # Below 1 the teacher sees a random square of the image, its side at least this part of the
    # whole, stretched to the whole, mirrored or not. Needs positives, and keys of the teacher.
    c.repulsor.view_min_crop = 1.0  # 1: the whole image
    c.repulsor.predictor = False  # BYOL's, between projection and loss; needs positives
    c.repulsor.same_class_weight = 1.0  # of negatives of the own class: 0 leaves them out
    c.repulsor.time_window = 1.0  # negatives further away in t do not count; 1: all do
    c.repulsor.temperature = 0.5  # tau
    c.repulsor.distance = "squared_l2"  # "squared_l2" or "cosine"
    c.repulsor.pooling = "mean"  # over tokens: "mean", "flatten", or "token": a row for each square
    c.repulsor.pool_grid = 2  # "token": squares along a side, 4 rows an image
    c.repulsor.projection_dim = 128  # d, length of the projected vectors
    # Memory of the bank and time of the loss grow with the rows; memory of the loss does not: the
    # loss goes through a large bank in chunks.
    c.repulsor.bank_rows = 65_536  # K, a multiple of the rows of a batch; 0 is no bank
    c.repulsor.bank_dtype = "bfloat16"  # "bfloat16" or "float32"
    c.repulsor.bank_start_step = 0  # before it nothing is put into the bank

    c.dispersive = _term(weight=0.5)
    c.dispersive.block = -1  # -1 is depth // 4
    c.dispersive.variant = "l2"  # "l2", "cosine", "hinge" or "covariance"
    c.dispersive.temperature = 0.5  # tau
    c.dispersive.margin = 1.0  # epsilon of the hinge variant

    c.layersync = _term(weight=0.2)
    c.layersync.student_block = -1  # -1 is block 8 of 28, counted from 1, scaled to the depth
    c.layersync.teacher_block = -1  # and 16 of 28

    c.sra = _term(weight=0.5)
    c.sra.student_block = -1  # -1 is a quarter of the depth
    c.sra.teacher_block = -1  # -1 is three quarters; the EMA network up to here is what it costs
    c.sra.time_gap = 0.2  # the teacher sees the image at min(1, t + U(0, time_gap))
    c.sra.teacher_labels = "dropped"  # what the teacher reads: the student's labels, or "true" ones
    c.sra.distance = "cosine"  # or "smooth_l1", the paper's
    c.sra.axis = "tokens"  # of the cosine: "tokens", as released, or "channels"
    c.sra.beta = 0.05  # smooth_l1
    c.sra.decay_start = 0  # the weight falls from this step on,
    c.sra.decay_steps = 0  # to a tenth in so many steps; 0: it does not

    c.latent_alignment = _term(weight=0.5)
    c.latent_alignment.block = -1  # -1 is depth // 4

    # Needs data.features. The weight is BFM's.
    c.feature_alignment = _term(weight=0.05)
    # -1 is the trunk's last of a blockwise network, else block depth // 3 counted from 1 (REPA has
    # block 8 of XL's 28, which is 7 here, and the weight 0.5).
    c.feature_alignment.block = -1  # a block's index
    c.feature_alignment.dim = 768  # P, width of the stored features: DINOv2-B's
    c.feature_alignment.head_size = 2_048  # of the two hidden layers of its head

    c.contrastive_flow = _term(weight=0.05)
    c.contrastive_flow.labelled_only = False  # leave out rows whose label was dropped

    c.optimizer = ml_collections.ConfigDict()
    c.optimizer.learning_rate = 1e-4
    c.optimizer.warmup_steps = 0  # linear
    c.optimizer.schedule = "constant"  # after the warm-up: "constant" or "cosine" (to 0)
    c.optimizer.b1 = 0.9
    c.optimizer.b2 = 0.999
    c.optimizer.eps = 1e-8
    c.optimizer.weight_decay = 0.0
    c.optimizer.clip_norm = 0.0  # clip the global gradient norm; 0 is off
    c.optimizer.accumulation_steps = 1  # micro-batches per optimizer step: less memory
    c.optimizer.ema_decay = 0.9999  # of the parameters that samples are drawn from

    c.data = ml_collections.ConfigDict()
    c.data.dir = ""  # latent data set (train/ and, optionally, test/ inside); "" is <workdir>/data
    # What --mode=encode reads: images from "folder", "archive", "tfds:<name>" or "digits", or
    # latents that others made, "npy", "fast-dit", "repa" or "lightning-dit" (docs/data.md).
    c.data.source = ""  # needed by --mode=encode alone
    c.data.source_path = ""  # the folder or archive; for tfds its data_dir
    c.data.train_split = "train"  # folder of the source, or split; becomes train/; "." is all
    c.data.test_split = "test"  # becomes test/, for evaluation; "" makes no test/
    c.data.image_size = 0  # centre-crop and resize to this side, as ADM; 0 takes images as they are
    c.data.flips = False  # store mirror images too; training then picks one of the two
    # "sd-vae-ft-ema", "sd-vae-ft-mse", "kl" (any diffusers AutoencoderKL), "taesd", "taesdxl",
    # "taesd3", "taef1", "taef2", "identity", or "none" for latents that nothing here can decode.
    c.data.autoencoder = "identity"  # pixels are the latents
    c.data.autoencoder_weights = ""  # file, folder or Hugging Face repo; "" is the published one
    c.data.autoencoder_dtype = "float32"  # of its computation: "float32" or "bfloat16"
    c.data.encode_if_missing = False  # encode before training where the data set is absent
    c.data.encode_batch_per_device = 32  # images in one call of the encoder
    c.data.encode_workers = -1  # processes that decode and crop images; -1: one per core
    c.data.on_bad_image = "fail"  # or "skip": report it, note it in dataset.json, and go on
    c.data.images_per_shard = 8_192  # per file; what a stopped --mode=encode loses at most
    c.data.preview_images = 16  # pictures before and after, and their PSNR, when encoded; 0: none
    c.data.dtype = "float16"  # of the stored latents: "float16" or "float32"
    c.data.verify = True  # check the files' SHA-256 before training, once while they are unchanged
    c.data.normalization = "scale"  # by the autoencoder's factor, or "statistics" (per channel)
    # Features of the training images, for the term feature_alignment: an .npy of float16 or float32
    # [images, tokens, feature_alignment.dim]; row i is image i of train/ (docs/systems.md).
    c.data.features = ""  # "": none
    c.data.read_threads = 4  # threads that read batches
    c.data.prefetch_batches = 8  # batches read ahead; at least read_threads

    # Sizes multiply to the number of devices of all hosts; -1 fills.
    c.mesh = ml_collections.ConfigDict()
    c.mesh.data = -1  # splits the batch; a multiple of the number of TPU slices
    c.mesh.fsdp = 1  # splits the batch, parameters, optimizer state and EMA
    c.mesh.tensor = 1  # splits attention heads and the MLP's width
    # A step gathers a copy of the parameters in model.dtype, and each device updates its share.
    c.mesh.split_update = True  # splits parameters, optimizer state and EMA over data too
    # In which gradients are then summed over devices, those of the model, of heads and of a learned
    # source alike: "float32", "bfloat16", or "model", the dtype in which each layer computes (heads
    # and source: float32).
    c.mesh.reduce_dtype = "model"  # others need split_update and tensor = 1

    c.checkpoint = ml_collections.ConfigDict()
    # A folder (relative to where the command runs) or gs://bucket/path; each run its own.
    c.checkpoint.directory = ""  # "" is <workdir>/checkpoints; gs:// needs the extra `gcs`
    c.checkpoint.every_steps = 10_000  # the last step is always saved
    c.checkpoint.keep_last = 3  # newest checkpoints to keep
    c.checkpoint.keep_every = 50_000  # and all at multiples of this step; 0: none
    # Where saving fails, training goes on and tries again every every_steps / 10 steps.
    c.checkpoint.max_lost_steps = 0  # it stops rather than lose more steps; 0: 3 x every_steps
    c.checkpoint.patience_seconds = 300.0  # wait and retry this long before stopping or at the end

    # A step whose loss, or the norm of its gradient, is not finite or is above these limits is
    # refused: it leaves the state as it was (docs/failures.md).
    c.divergence = ml_collections.ConfigDict()
    c.divergence.policy = "stop"  # then "stop", "skip" (that batch) or "rollback" (a checkpoint)
    c.divergence.max_events = 10  # refusals in a row before "skip" and "rollback" stop
    c.divergence.max_loss = 0.0  # 0: no limit
    c.divergence.max_grad_norm = 0.0  # before clipping; 0: no limit

    c.log = ml_collections.ConfigDict()
    c.log.every_steps = 100  # scalars are means over this many steps
    # What the terms do to the representation, as numbers and as <workdir>/diagnostics.png
    # (docs/training.md). A look takes as long as a few steps; no other step is slower for it.
    c.log.diagnostics_every_steps = 10_000  # and at the end; 0 is never
    c.log.profile_steps = ()  # (first, last) steps to profile, into <workdir>/profile; () is none
    c.log.watchdog_minutes = 30.0  # without progress before a warning with all stacks; 0: none
    c.log.page = True  # <workdir>/report.html: the run to look at (docs/training.md)
    # A project of Weights & Biases, to log to it too; needs the extra `wandb`. Entity and key come
    # from the environment: WANDB_ENTITY, WANDB_API_KEY or `wandb login`.
    c.log.wandb = ""  # "" is off

    c.sampling = ml_collections.ConfigDict()
    # ODE: "euler", "midpoint", "heun", "rk4", and "dopri5", which chooses its own steps. SDE:
    # "euler_maruyama", "stochastic_heun".
    c.sampling.solver = "heun"  # 2 evaluations of the model a step; euler takes 1, rk4 4
    c.sampling.num_steps = 50
    c.sampling.time_shift = 1.0  # above 1: smaller steps near noise (SD3 has 3); 1 is even steps
    # Contrastive flow matching with weight w lengthens the velocity; 1 - w takes that back. Samples
    # follow s v + (1 - s) m, m the mean latent.
    c.sampling.velocity_scale = 1.0  # s
    c.sampling.rtol = 1e-3  # dopri5: relative tolerance of a step
    c.sampling.atol = 1e-6  # dopri5: absolute tolerance
    c.sampling.max_steps = 1_000  # dopri5: a sample that needs more is an error
    # SDE: "constant", "sbdm", "sigma", "linear", "decreasing" or "increasing_decreasing".
    c.sampling.diffusion_form = "sigma"  # how much noise is added along the way
    c.sampling.diffusion_norm = 1.0  # SDE: its factor
    c.sampling.last_step = "mean"  # SDE: without noise, "mean", "tweedie", "euler", or "none"
    c.sampling.last_step_size = 0.04  # SDE: length of that step in time
    c.sampling.cfg_scale = 1.0  # classifier-free guidance; 1 is off and costs nothing
    c.sampling.cfg_interval_low = 0.0  # guide between these times only; 0 is noise
    c.sampling.cfg_interval_high = 1.0  # 1 is data
    c.sampling.cfg_channels = 0  # guide only the first channels (SiT: 3); 0 is all
    # Autoguidance (arXiv 2406.02507): samples are guided away from a weaker run, in place of the
    # model without a class.
    c.sampling.guiding_run = ""  # that run's working directory or checkpoints; "": no such run
    c.sampling.guiding_step = -1  # which of its checkpoints; -1 is the newest
    # Numbers or names, as (207, 360) or ("golden retriever",). They go into the protocol: in an
    # evaluation these classes are compared with the whole reference.
    c.sampling.classes = ()  # () is all of the data set
    c.sampling.labels = "balanced"  # "balanced" (index mod the data's classes) or "random"
    c.sampling.num_samples = 64  # written by --mode=sample
    c.sampling.batch_size = 64  # global
    c.sampling.images_per_shard = 1_024  # kept at a time: what a stopped job loses at most
    c.sampling.rounding = "dit"  # to 8 bits, as "dit" (and SiT) or "adm" (docs/evaluation.md)
    c.sampling.save_png = False  # --mode=sample: also a folder of PNG files
    # With mesh.fsdp, and no mesh.tensor: gather the parameters once a batch, 4 bytes each on every
    # device. False, for parameters that do not fit, gathers them in every evaluation of every block
    # at many times the traffic; grids in training always do, for the state takes the memory.
    c.sampling.gather_params = True  # once a batch
    c.sampling.decode_slice = 0  # latents decoded at a time: less memory, same images; 0: all
    c.sampling.seed = 0  # sample i depends on (seed, i) alone
    c.sampling.grid_every_steps = 10_000  # a grid of samples, and at the end; 0 is never
    c.sampling.grid_samples = 64
    c.sampling.grid_columns = 8

    c.evaluation = ml_collections.ConfigDict()
    c.evaluation.num_samples = 50_000  # of --mode=evaluate
    c.evaluation.every_steps = 0  # evaluate in training too, and at its end; 0 is never
    c.evaluation.training_samples = 2_000  # used then; compare only at the same count
    # The space of the distances. "inception": FID, sFID, IS, KID, precision, recall. "pixels" (for
    # small images), "autoencoder": a Fréchet distance without Inception's weights: not FID.
    c.evaluation.features = "inception"  # "inception", "pixels" or "autoencoder"
    c.evaluation.inception_weights = ""  # a path; "" downloads them once (docs/evaluation.md)
    # An .npz as the ADM suite has them, an .npy, a folder or archive of images, "tfds:<name>", or
    # "train" or "test", the latents of data.dir decoded.
    c.evaluation.reference = "test"  # what samples are compared with
    c.evaluation.reference_split = "."  # folder of it, or split
    c.evaluation.reference_features = 10_000  # of its images, for precision, recall and KID
    c.evaluation.batch_size = 64  # global; images of the reference or of an .npz at a time
    c.evaluation.samples = ""  # images in place of checkpoints: .npz, .npy, folder, archive
    c.evaluation.cfg_scales = ()  # a sweep: every scale with every interval; () is sampling's own
    c.evaluation.cfg_intervals = ()  # pairs (low, high) of times
    c.evaluation.poll_seconds = 30  # --checkpoint_step=follow: how often to look

    # The section of the version before terms, for one release: what is set here goes to `terms` and
    # to the sections `repulsor` and `dispersive`.
    former = {"name": str, "weight": float, "warmup_steps": int, "block": int, "temperature": float}
    former |= {"distance": str, "pooling": str, "projection_dim": int, "bank_rows": int}
    former |= {"bank_dtype": str, "variant": str, "margin": float}
    unset = ml_collections.config_dict.placeholder
    c.regularizer = ml_collections.ConfigDict({name: unset(kind) for name, kind in former.items()})
    return c


def _term(weight: float) -> ml_collections.ConfigDict:
    """What every term has."""
    t = ml_collections.ConfigDict()
    t.weight = weight  # lambda; 0 is the same as without the term
    t.warmup_steps = 0  # steps over which lambda grows linearly from 0
    t.decay_from = 1.0  # from this share of training on it falls linearly, to 0 at the end
    t.stop_step = 0  # lambda is 0 from this step on; 0: never
    return t
