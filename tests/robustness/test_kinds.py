"""What goes wrong in the world by kind, and where at least three of each kind are tried.

a picture that cannot be drawn loses the adapter
    test_run_saving::test_a_picture_that_fails_is_one_warning
    test_run_saving::test_a_full_disk_at_the_picture_is_said_and_what_was_trained_is_saved
    test_run_saving::test_the_last_evaluation_comes_after_saving
    test_run_saving::test_an_interrupt_in_training_says_that_nothing_was_saved
a full disk is a traceback
    test_full_disk::test_a_command_is_one_line_and_leaves_nothing
    test_full_disk::test_a_run_is_one_line_at_its_recipe_its_metrics_and_its_adapter
    test_kills::test_a_full_disk_is_one_line_and_the_checkpoint_before_is_whole
    test_kills::test_no_room_for_the_first_checkpoint
an expression of a file hangs what reads it
    test_bounded_expressions::test_an_expression_that_burns_time_is_refused
    test_bounded_expressions::test_many_slow_expressions_are_slow_together_no_longer_than_one
    test_bounded_operations::test_an_expression_that_goes_around_without_end_is_one_error
    test_bounded_operations::test_a_template_is_stopped
a number of a file is allocated before it is held against the file
    test_bounded_files::test_a_config_that_asks_for_more_than_its_file_has_allocates_nothing
    test_bounded_operations::test_a_count_is_held_against_the_file_before_anything_is_made
    test_hostile_files::test_a_config_that_asks_for_terabytes_allocates_nothing
    test_hostile_files::test_an_adapter_that_asks_for_terabytes_allocates_nothing
    test_bounded_expressions::test_loftq_goes_around_a_bounded_number_of_times
a small text takes memory or time without bound in its parser
    test_bounded_files::test_a_bomb_in_toml_is_refused_before_it_is_parsed
    test_bounded_files::test_a_doubled_key_is_found_in_one_pass
    test_hostile_files::test_hostile_json_is_refused
    test_hostile_files::test_a_json_file_too_large_is_not_read
a name is read as markup, or reaches the terminal as commands
    test_strangers_text::test_a_control_character_is_shown
    test_strangers_text::test_lines_and_tables_print_a_name_as_it_is
    test_strangers_text::test_the_log_reaches_the_terminal_by_the_same_way
    test_strangers_text::test_a_base_name_is_one_text_in_the_cards_front_matter
    test_strangers_text::test_a_line_is_bounded
two runs write into one directory
    test_kills::test_a_second_run_in_the_directory_is_refused
    test_kills::test_two_that_begin_together
    test_signals::test_a_second_run_in_the_directory_is_refused_until_the_first_is_done
    test_last_line::test_another_at_work_there_is_refused
a kill leaves the new half of an adapter over the old one
    test_replacing::test_where_directories_can_be_swapped_it_is_the_old_or_the_new_one
    test_replacing::test_elsewhere_a_new_config_never_stands_over_old_tensors
    test_replacing::test_what_another_process_is_writing_is_no_litter
    test_hostile_files::test_a_failure_while_moving_leaves_the_old_content
what never ends, or is no file, is read
    test_bounded_files::test_what_never_ends_is_no_file
    test_hostile_files::test_what_is_no_regular_file_is_not_opened
    test_hostile_files::test_a_key_that_stands_twice_among_many_is_found_at_once
"""

import re

import pytest
from named_tests import is_there, named_in

KINDS = re.findall(r"^(\w.*)\n((?:    .*\n)+)", __doc__, re.MULTILINE)


@pytest.mark.parametrize(("kind", "tests"), KINDS, ids=[kind for kind, _ in KINDS])
def test_three_of_each_kind_are_tried(kind, tests):
    names = named_in(tests)
    assert len(names) >= 3
    assert [name for name in names if not is_there(name)] == []
