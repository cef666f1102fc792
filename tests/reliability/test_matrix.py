"""What the book must survive, row by row, and the tests that show it.

The rows are those of the project's reliability matrix: faults of execution (A), parameters (B), data (C), checkpoints
(D), numerics (E), results and book (F), environment and load (G). Where `make test` cannot show a part of a row,
`ELSEWHERE` says why.
"""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]

#: Row -> what it is about, and its tests as `file: names`.
MATRIX: dict[str, tuple[str, dict[str, str]]] = {
    "A1": (
        "an exception in a middle cell",
        {
            "test_runner": "test_a_failed_run_says_why_and_keeps_what_there_is "
            "test_other_chapters_go_on_after_a_failure",
            "reliability/test_execution": "test_what_a_run_started_ends_with_it",
        },
    ),
    "A2": (
        "the kernel is killed",
        {
            "test_runner": "test_a_failed_run_says_why_and_keeps_what_there_is",
            "reliability/test_execution": "test_what_a_run_started_ends_with_it",
        },
    ),
    "A3": (
        "a cell takes too long",
        {
            "test_runner": "test_a_cell_that_takes_too_long_is_stopped",
            "reliability/test_execution": "test_what_a_run_started_ends_with_it "
            "test_a_run_that_stands_still_in_a_cell_is_broken_off "
            "test_a_run_that_stands_still_after_its_last_cell_loses_nothing",
        },
    ),
    "A4": (
        "signals to the runner",
        {
            "test_runner": "test_no_process_outlives_a_stopped_runner",
            "test_experiment": "test_an_interrupted_experiment_goes_on_where_it_stopped",
            "reliability/test_execution": "test_signals_at_random_moments_leave_the_old_result_and_no_process "
            "test_what_a_killed_runner_left_behind_ends_with_the_next_run "
            "test_a_worker_that_is_killed_is_named_and_its_kernel_goes_too",
        },
    ),
    "A5": ("sys.exit in a cell", {"test_runner": "test_a_failed_run_says_why_and_keeps_what_there_is"}),
    "A6": (
        "an unknown kernel",
        {
            "test_runner": "test_an_unknown_kernel_is_named_before_anything_is_written",
            "reliability/test_execution": "test_a_kernel_whose_program_is_gone_is_named",
        },
    ),
    "A7": (
        "no folder, no permission, no space",
        {
            "test_runner": "test_a_target_that_cannot_be_written_fails_cleanly",
            "test_records": "test_a_failed_write_leaves_the_old_file",
            "reliability/test_execution": "test_a_disk_that_is_full_is_named_and_the_old_result_stands "
            "test_a_file_that_may_not_grow_is_named_and_the_old_result_stands "
            "test_a_build_folder_that_is_none_fails_cleanly",
        },
    ),
    "A8": (
        "two runs to one path",
        {
            "test_runner": "test_a_second_run_of_the_same_chapter_is_refused",
            "reliability/test_execution": "test_of_two_runs_of_one_chapter_one_refuses",
        },
    ),
    "A9": (
        "32 starts at once",
        {
            "reliability/test_execution": "test_thirty_two_runs_start_at_once_with_one_thread_each "
            "test_a_kernel_is_reached_through_files_of_the_run_alone "
            "test_a_kernel_that_does_not_come_up_is_started_again_twice "
            "test_a_start_that_hangs_is_broken_off_and_made_again"
        },
    ),
    "A10": (
        "a GPU is missing or taken",
        {
            "test_chapter": "test_provenance_names_the_run_and_no_person_or_folder",
            "reliability/test_environment": "test_a_chapter_runs_without_a_home_on_one_core_with_little_memory_"
            "into_another_folder",
        },
    ),
    "A11": ("the GPU's memory is full", {}),
    "A12": (
        "death while a file is written",
        {
            "reliability/test_execution": "test_a_file_that_is_being_replaced_is_whole_at_every_moment",
            "reliability/test_numerics": "test_a_death_while_weights_are_saved_leaves_whole_files_only",
        },
    ),
    "A13": (
        "a worker is lost",
        {
            "reliability/test_execution": "test_a_worker_that_is_killed_is_named_and_its_kernel_goes_too "
            "test_twenty_three_chapters_with_five_seeds_survive_two_deaths_of_the_runner",
            "test_ray": "test_a_worker_that_is_killed_is_survived_with_the_same_result "
            "test_a_node_that_is_lost_is_survived_with_the_same_result",
        },
    ),
    "A14": (
        "the clock jumps",
        {"reliability/test_execution": "test_durations_come_from_a_clock_that_does_not_jump"},
    ),
    "A15": ("the tag raises-exception", {"test_chapters": "test_code_cells_are_short_and_plain"}),
    "B1": (
        "an unknown parameter",
        {
            "test_parameters": "test_unknown_name_is_refused_with_the_known_ones",
            "test_runner": "test_plain_papermill_refuses_faulty_parameters_before_anything_runs",
            "test_chapter": "test_a_faulty_parameter_stops_the_notebook",
        },
    ),
    "B2": (
        "values that YAML turns into others",
        {
            "test_parameters": "test_what_yaml_turns_into_something_else_is_refused "
            "test_command_line_text_becomes_typed",
            "reliability/test_fuzz": "test_any_file_is_a_catalogue_or_is_refused "
            "test_a_damaged_catalogue_is_read_or_refused test_a_catalogue_with_one_other_value_is_sound_or_refused "
            "test_any_profile_file_is_a_mapping_or_is_refused "
            "test_a_parameter_given_twice_in_a_profile_is_refused test_what_yaml_lets_pass_is_refused",
        },
    ),
    "B3": (
        "values out of range",
        {
            "test_parameters": "test_refuses_a_value_and_says_what_is_expected",
            "test_experiment": "test_bad_input_is_named",
            "reliability/test_fuzz": "test_any_values_are_checked_or_refused",
        },
    ),
    "B4": (
        "no parameters cell, two, or a faulty one",
        {
            "test_parameters": "test_a_notebook_needs_exactly_one_parameters_cell",
            "reliability/test_fuzz": "test_any_parameters_cell_is_read_or_refused test_a_cell_that_is_none_is_refused "
            "test_any_notebook_has_parameters_or_is_refused",
        },
    ),
    "B5": (
        "odd paths",
        {
            "reliability/test_execution": "test_a_project_with_an_odd_name_reached_through_the_home_sign",
            "reliability/test_fuzz": "test_a_slug_is_a_known_one_or_is_refused test_an_unknown_profile_is_refused",
        },
    ),
    "B6": (
        "code in a parameter's text",
        {
            "reliability/test_fuzz": "test_code_in_a_text_stays_text "
            "test_any_text_on_the_command_line_is_a_value_or_is_refused"
        },
    ),
    "C1": (
        "damaged downloads",
        {
            "data/test_download": "test_other_bytes_are_refused_and_removed_and_not_asked_for_again "
            "test_a_web_page_instead_of_the_file_is_called_that test_a_file_that_breaks_off_is_tried_again",
            "data/test_fetch": "test_fetch_leaves_the_registered_files_and_nothing_else",
            "data/test_unpack": "test_a_damaged_archive",
        },
    ),
    "C2": (
        "servers that fail, and none at all",
        {
            "data/test_download": "test_a_refusal_is_not_asked_for_again test_a_lasting_fault_is_tried_three_times "
            "test_a_reset_connection_is_tried_again test_a_silent_server_is_given_up "
            "test_a_server_that_drips_is_given_up test_nobody_there",
            "data/test_fetch": "test_offline_gives_the_steps_by_hand test_offline_with_good_data_works",
        },
    ),
    "C3": (
        "redirects",
        {
            "data/test_download": "test_redirects_are_followed_and_bounded test_a_redirect_away_from_https_is_refused "
            "test_only_https_is_spoken"
        },
    ),
    "C4": (
        "malicious archives",
        {
            "data/test_unpack": "test_names_that_point_outside_are_refused test_links_and_devices_are_refused "
            "test_a_link_in_a_zip_is_refused test_a_bomb_is_stopped_at_the_registered_size"
        },
    ),
    "C5": ("two downloads at once", {"data/test_fetch": "test_two_processes_download_once"}),
    "C6": (
        "data that are not what they should be",
        {
            "data/test_checks": "test_not_a_number_is_found test_wrong_labels_are_found test_wrong_shapes_are_found "
            "test_equal_content_is_found",
            "data/test_image_sets": "test_a_label_out_of_range_is_named test_wrong_picture_folders_are_named",
        },
    ),
    "C7": (
        "a source that changed",
        {
            "data/test_fetch": "test_a_changed_upstream_fails_loudly "
            "test_a_changed_member_fails_even_without_an_archive_checksum",
        },
    ),
    "C8": (
        "test data among the training data",
        {
            "data/test_checks": "test_overlap_and_duplicates_against_lists",
            "data/test_video_sets": "test_training_and_validation_clips_show_different_digits",
        },
    ),
    "D1": (
        "damaged and foreign checkpoints",
        {
            "test_experiment": "test_a_torn_cache_file_is_trained_again",
            "training/test_weight_store": "test_missing_damaged_and_unfitting_weights_are_refused",
            "reliability/test_numerics": "test_weights_that_break_off_are_never_loaded "
            "test_weights_that_break_off_are_refused_with_what_to_do",
        },
    ),
    "D2": (
        "malicious pickles",
        {
            "test_house": "test_library_code_is_honest",
            "data/test_image_sets": "test_a_malicious_pickle_is_refused_and_not_run",
            "reliability/test_numerics": "test_harm_in_stored_weights_is_refused_and_not_run",
        },
    ),
    "D3": (
        "a resumed run equals a straight one",
        {
            "techniques/test_adan": "test_state_dict_round_trip_continues_the_same_run",
            "techniques/test_procrustes": "test_a_resumed_run_equals_an_uninterrupted_one",
            "techniques/test_pruning_bitwidth": "test_a_run_that_is_resumed_ends_as_one_that_was_not",
            "techniques/test_progressive_layer_dropping": "test_a_resumed_run_throws_the_coins_of_an_uninterrupted_one",
            "techniques/test_swiftlearn": "test_a_run_goes_on_where_it_stopped",
            "training/test_schedules": "test_the_schedule_resumes_from_its_state",
            "data/test_image_sets": "test_the_trainers_epochs_give_the_batches_also_after_a_resume",
            "reliability/test_numerics": "test_clars_goes_on_where_it_stopped",
            "reliability/test_resume": "test_a_run_goes_on_where_it_stopped_to_the_last_bit "
            "test_a_checkpoint_alone_is_enough_to_go_on test_seeded_data_go_on_where_they_stopped "
            "test_what_a_run_counts_and_collects_goes_on_too",
        },
    ),
    "D4": (
        "resuming within an epoch",
        {"test_experiment": "test_an_interrupted_experiment_goes_on_where_it_stopped"},
    ),
    "D5": (
        "resuming with other settings",
        {
            "test_experiment": "test_the_key_depends_on_everything_a_run_depends_on "
            "test_the_key_depends_on_arm_seed_and_data",
            "test_records": "test_each_thing_a_run_depends_on_makes_it_stale_by_name",
        },
    ),
    "E1": (
        "losses that are no numbers",
        {
            "test_experiment": "test_a_diverged_run_is_kept_as_a_miss",
            "training/test_image_classifier": "test_a_loss_that_is_no_number_stops_the_run_and_names_the_step",
            "training/test_language_model": "test_a_loss_that_is_not_finite_ends_the_run",
            "training/test_masked_language_model": "test_a_loss_that_is_no_number_ends_the_run",
            "training/test_sequence_classifier": "test_a_loss_that_is_no_number_stops_the_run",
            "techniques/test_fgsm_sdi": "test_a_loss_that_is_no_number_ends_the_run",
        },
    ),
    "E2": (
        "one seed, two seeds",
        {
            "test_experiment": "test_two_runs_are_equal_to_the_last_bit "
            "test_every_arm_of_a_seed_sees_the_same_batches_and_random_numbers",
            "training/test_image_classifier": "test_the_same_seed_gives_the_same_weights_to_the_last_bit",
        },
    ),
    "E3": (
        "other processors and precisions",
        {
            "training/test_image_classifier": "test_mixed_bfloat16_trains_close_to_float32_and_keeps_the_loss_in_"
            "float32",
            "reliability/test_environment": "test_checked_outputs_hold_with_one_thread_on_an_older_processor",
        },
    ),
    "E4": (
        "odd tensors",
        {
            "reliability/test_numerics": "test_tensors_without_elements_dimensions_or_gradients "
            "test_a_weight_that_two_layers_share_is_held_once",
            "techniques/test_adan": "test_sparse_gradients_are_refused_before_anything_changes "
            "test_zero_gradients_give_no_update test_shared_weights_are_updated_once",
            "techniques/test_clars": "test_the_ratio_is_capped_and_zero_weights_start_from_one",
            "techniques/test_procrustes": "test_bad_input_is_refused",
        },
    ),
    "E5": (
        "odd batches",
        {
            "reliability/test_numerics": "test_one_image_a_short_last_batch_and_one_class "
            "test_a_text_of_one_token_has_nothing_to_predict "
            "test_one_image_of_one_pixel_cannot_be_normalised_and_pytorch_says_so",
            "techniques/test_hardware_aware_resnet9": "test_a_batch_of_one_cannot_be_halved",
        },
    ),
    "E6": (
        "a technique that is switched off is the baseline",
        {
            "techniques/test_adan": "test_without_differences_it_is_adam_to_the_last_bit",
            "techniques/test_clars": "test_with_all_tensors_plain_it_is_momentum_sgd_to_the_last_bit",
            "techniques/test_compressed_gpt2": "test_all_blocks_give_the_parent_to_the_bit",
            "techniques/test_fgsm_sdi": "test_a_cube_of_size_zero_is_plain_training_to_the_bit",
            "techniques/test_gqkva": "test_switched_off_the_model_is_timms",
            "techniques/test_hardware_aware_lrd": "test_none_leaves_the_model_as_it_is",
            "techniques/test_hardware_aware_resnet9": "test_switched_off_it_is_nesterov_sgd_to_the_last_bit",
            "techniques/test_lrd_rank_freeze": "test_switched_off_it_is_ordinary_training",
            "techniques/test_plrd": "test_full_rank_keeps_the_logits_and_the_parent",
            "techniques/test_procrustes": "test_with_the_full_budget_it_is_sgd_to_the_last_bit",
            "techniques/test_progressive_layer_dropping": "test_switched_off_the_run_is_the_baselines_bit_for_bit",
            "techniques/test_pruning_bitwidth": "test_a_sparsity_of_zero_is_no_pruning_to_the_bit",
            "techniques/test_skipvit": "test_switched_off_it_is_the_baseline_to_the_last_bit",
            "techniques/test_swiftlearn": "test_switched_off_it_is_plain_training_to_the_last_bit",
            "low_rank/test_factors": "test_full_rank_is_the_layer",
        },
    ),
    "E7": (
        "odd operands for the emulators",
        {
            "hardware/test_tensordash": "test_dense_and_empty_streams test_values_from_the_moves_equal_autograd",
            "hardware/test_gradient_sparsity": "test_counts_of_dense_and_empty_masks "
            "test_simulated_work_slots_and_bounds",
            "hardware/test_fpraker": "test_terms_of_all_significands test_values_of_tiles_equal_autograd "
            "test_bad_input_is_refused",
            "hardware/test_procrustes": "test_compressed_blocks_keep_special_values "
            "test_cycles_keep_their_bounds_and_slots_add_up",
            "hardware/test_trace": "test_zero_means_zero_after_rounding test_bad_passes_are_refused_by_name",
        },
    ),
    "E8": (
        "scaling and reordering",
        {
            "hardware/test_fpraker": "test_one_set_is_monotone_and_does_not_see_signs_or_scale",
            "techniques/test_adan": "test_without_eps_the_scale_of_the_gradient_does_not_matter",
            "techniques/test_clars": "test_scale_of_loss_and_of_weights",
            "techniques/test_fasthebb": "test_order_of_patches_and_of_neurons",
            "techniques/test_skipvit": "test_permuting_the_patches_permutes_the_score",
        },
    ),
    "F1": (
        "a library that changed after the run",
        {
            "test_published": "test_a_published_chapter_is_fresh_and_from_a_commit",
            "test_records": "test_each_thing_a_run_depends_on_makes_it_stale_by_name",
            "test_sphinx_ext": "test_a_small_book_renders_without_a_warning_and_notices_when_a_chapter_goes_stale",
            "reliability/test_execution": "test_a_library_file_that_is_being_edited_fails_the_run_by_name",
        },
    ),
    "F2": (
        "errors, missing outputs, disorder",
        {
            "test_book": "test_a_chapter_that_cannot_be_shown_is_named_with_its_reason "
            "test_cells_that_did_not_run_in_order test_a_missing_chapter_fails_the_build_by_name",
            "reliability/test_fuzz": "test_a_notebook_with_one_other_value_holds_the_record_or_none",
        },
    ),
    "F3": ("numbers typed in the prose", {"test_chapters": "test_no_measured_number_is_typed_in_the_prose"}),
    "F4": ("claims from too few runs", {"test_catalog": "test_too_few_runs_make_a_verdict_indicative"}),
    "F5": (
        "scripts, addresses, names and tokens in outputs",
        {"test_book": "test_the_scrubber_names_the_cell_and_what_it_shows test_metadata_are_searched"},
    ),
    "F6": (
        "endless outputs",
        {
            "reliability/test_results": "test_outputs_that_no_page_can_show_stop_the_build_by_name",
            "test_pages": "test_a_page_without_its_figures_stays_under_one_megabyte",
        },
    ),
    "F7": (
        "broken links, citations, pictures without words",
        {
            "test_pages": "test_every_link_within_the_book_leads_somewhere test_every_picture_says_what_it_shows",
            "test_sphinx_ext": "test_unknown_names_fail_the_build_and_are_all_named",
            "test_papers": "test_citation_agrees_with_the_row",
            "test_browser": "test_a_page_is_sound_and_open_to_everyone",
        },
    ),
    "F8": (
        "building twice",
        {"reliability/test_results": "test_two_builds_in_other_places_and_time_zones_are_equal_and_need_no_network"},
    ),
    "F9": (
        "building offline",
        {
            "reliability/test_results": "test_two_builds_in_other_places_and_time_zones_are_equal_and_need_no_network",
            "test_pages": "test_pages_load_nothing_from_elsewhere",
        },
    ),
    "F10": (
        "access for all readers",
        {
            "test_plotting": "test_colours_stay_apart_in_greyscale test_colours_stay_apart_for_the_colour_blind",
            "test_pages": "test_headings_skip_no_level test_no_anchor_stands_twice",
            "test_sphinx_ext": "test_the_scoreboard_is_a_table_that_a_screen_reader_can_walk",
            "test_browser": "test_a_page_is_sound_and_open_to_everyone",
        },
    ),
    "G1": ("a clean machine", {"test_house": "test_the_readmes_commands_run"}),
    "G2": ("the newest versions", {}),
    "G3": ("the oldest versions", {"test_house": "test_the_lock_pins_every_dependency_exactly"}),
    "G4": (
        "something is not installed",
        {
            "test_book": "test_without_a_browser_the_error_says_how_to_get_one",
            "test_sphinx_ext": "test_without_its_package_the_mathjax_step_says_what_to_install",
            "test_ray": "test_without_ray_the_command_says_how_to_get_it",
        },
    ),
    "G5": (
        "poor machines",
        {
            "reliability/test_environment": "test_a_chapter_runs_without_a_home_on_one_core_with_little_memory_"
            "into_another_folder"
        },
    ),
    "G6": (
        "all chapters, five seeds, two deaths",
        {"reliability/test_execution": "test_twenty_three_chapters_with_five_seeds_survive_two_deaths_of_the_runner"},
    ),
    "G7": (
        "importing is free",
        {
            "reliability/test_environment": "test_importing_the_library_touches_nothing_and_loads_nothing_heavy",
            "test_catalog": "test_importing_the_command_line_loads_no_heavy_package",
        },
    ),
    "G8": (
        "workers of the loaders",
        {
            "data/test_image_sets": "test_pictures_do_not_depend_on_workers_or_global_generators",
            "data/test_sentence_sets": "test_the_map_style_set_knows_every_samples_place",
        },
    ),
}

#: What `make test` cannot show, and why.
ELSEWHERE = {
    "A10": "needs a GPU to take away; a record says which accelerator it ran on, and the pages print it",
    "A11": "needs a GPU whose memory can be filled",
    "D4": "nothing resumes within a run: what is kept is a finished pair of arm and seed",
    "E3": "GPU against CPU needs a GPU",
    "F7": "links to other sites need a network, which the tests do without",
    "G1": "the gate itself runs on a clean checkout with nothing but the README's commands",
    "G2": "needs the package index, which the tests do without; readers have the versions of the lock",
    "G3": "only the locked versions are supported, and the lock pins all of them",
    "G4": "every package that a chapter imports is in the lock; only Ray and a browser are optional",
}

LENGTHS = {"A": 15, "B": 6, "C": 8, "D": 5, "E": 8, "F": 10, "G": 8}
ROWS = [f"{letter}{number}" for letter, last in LENGTHS.items() for number in range(1, last + 1)]


@cache
def functions(file):
    return {n.name for n in ast.parse(file.read_text(encoding="utf-8")).body if isinstance(n, ast.FunctionDef)}


@pytest.mark.parametrize("row", ROWS)
def test_every_row_has_tests_that_exist_or_a_reason(row):
    about, tests = MATRIX[row]
    assert about
    assert tests or ELSEWHERE[row]
    for name, wanted in tests.items():
        assert set(wanted.split()) <= functions(TESTS / f"{name}.py"), f"{row}: {name}"


def test_there_are_no_other_rows_and_no_test_of_reliability_is_without_one():
    assert list(MATRIX) == ROWS
    assert set(ELSEWHERE) <= set(ROWS)
    named = {test for _, tests in MATRIX.values() for names in tests.values() for test in names.split()}
    for file in Path(__file__).parent.glob("test_*.py"):
        if file != Path(__file__):
            assert {f for f in functions(file) if f.startswith("test_")} <= named, file.name
