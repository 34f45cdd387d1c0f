from lightning_recipes.core.tables import as_html


def test_a_table_has_all_its_cells_and_nothing_that_a_name_brings() -> None:
    found = as_html("| member | loss | |\n|---|---|---|\n| <i>a</i> | | ** |\n| **b** | 1 | |\n\nTake b & **c**.")
    assert found == (
        "<table><tr><td>member</td><td>loss</td><td></td></tr>"
        "<tr><td>&lt;i&gt;a&lt;/i&gt;</td><td></td><td>**</td></tr><tr><td><b>b</b></td><td>1</td><td></td></tr></table>"
        "<p>Take b &amp; **c**.</p>"
    )
